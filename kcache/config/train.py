"""What a training run is told to do: what each of the two networks is told, beside what both are."""

from dataclasses import dataclass

from kcache.config.run import RunConfig
from kcache.config.train_checks import check_run
from kcache.config.words import OptimizerName
from kcache.settings import check, setting
from kcache.urls import check_local

OWN_SHARE = 0.5
"""In which share of its turns a sample takes a mask of its own, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """What `kcache train-prior` and `kcache train-decoder` are told; names and defaults are the upstream scripts'."""

    packing: bool = setting(
        True, "Leave the padding of captions out of the network: less arithmetic, the same result.", only="prior"
    )
    noise_draws: int = setting(
        1,
        "Draws of noise and timestep per caption and step; packed, they share the work on its text.",
        least=1,
        kept=True,
        only="prior",
    )
    caption_dropout: float = setting(
        0.0,
        "Share of samples that come without their caption, for classifier-free guidance.",
        share=True,
        kept=True,
        only="prior",
    )
    class_prompt: tuple[str, ...] = setting(
        (),
        "What the prior is to keep drawing as it does now, such as 'a photo of a dog': before training it draws class "
        "rows of it, which join every batch; repeat it.",
        kept=True,
        only="prior",
    )
    num_class_rows: int = setting(
        100,
        "Image embeddings drawn of each class prompt.",
        least=1,
        kept=True,
        only="prior",
        beside=("class_prompt",),
    )
    prior_loss_weight: float = setting(
        1.0,
        "How much the loss of the class rows counts beside that of the samples.",
        above=0,
        kept=True,
        only="prior",
        beside=("class_prompt",),
    )
    resolution: tuple[int, ...] = setting(
        (),
        "Which latents to read, by the side in pixels of squares of their area; repeat it to take each picture once an "
        "epoch at each. The only ones there are when left out.",
        least=1,
        swept=False,
        only="decoder",
    )
    aspect_ratio_buckets: bool | None = setting(
        None,
        "Read the latents of pictures of several shapes, or those of squares, where the cache has both.",
        swept=False,
        only="decoder",
    )
    flip: bool | None = setting(
        None,
        "Take the mirrored picture in half of the turns. When left out the decoder does so where the cache has them, "
        "and the prior, whose captions may tell left from right, does not.",
        swept=False,
    )
    image_dropout: float = setting(
        0.0,
        "Share of samples that come without their image embedding, for classifier-free guidance.",
        share=True,
        kept=True,
        only="decoder",
    )
    inpaint: bool = setting(
        False,
        "Train the decoder that fills holes in pictures, with a new mask at every turn.",
        kept=True,
        swept=False,
        only="decoder",
    )
    mask_growth: bool = setting(
        True,
        "Let holes grow by a latent pixel, as diffusers' pipeline does with each that it is given.",
        kept=True,
        only="decoder",
        beside=("inpaint",),
    )
    hole_loss: bool = setting(
        False,
        "Learn from the hole alone; Kandinsky learned from the whole picture.",
        kept=True,
        only="decoder",
        beside=("inpaint",),
    )
    mask_share: float | None = setting(
        None,
        "Share of the turns of a sample that has a mask of its own in which it takes that; 0.5 when left out.",
        share=True,
        kept=True,
        only="decoder",
        beside=("inpaint",),
    )
    hint: str | None = setting(
        None,
        "Train the decoder that draws by a hint: which of those that the cache has, such as depth.",
        kept=True,
        swept=False,
        only="decoder",
    )
    loss_mask: bool = setting(
        False, "Let each part of a picture count as much as its loss mask says.", kept=True, only="decoder"
    )

    def __post_init__(self) -> None:
        check(self)
        for path in filter(None, (self.output_dir, self.logging_dir, self.cache_dir, self.stage_dir)):
            check_local(path)
        check_run(self)

    @property
    def chosen_optimizer(self) -> OptimizerName:
        """The optimizer, by whichever flag it was asked for."""
        return "adamw-8bit" if self.use_8bit_adam else self.optimizer

    @property
    def own_share(self) -> float:
        """In which share of its turns a sample takes a mask of its own."""
        return OWN_SHARE if self.mask_share is None else self.mask_share

    @property
    def mirrored(self) -> bool | None:
        """Whether mirrored pictures are read; None where they are if the cache has them."""
        return False if self.flip is None and self.stage == "prior" else self.flip
