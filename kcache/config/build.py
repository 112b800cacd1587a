"""What a build is told to do."""

from dataclasses import dataclass
from typing import Literal

from kcache.config.shapes import parse_shapes
from kcache.config.source import SourceConfig
from kcache.config.words import COMPUTE_DTYPES, DECODER_REPO, PRIOR_REPO, MixedPrecision, Stage, check_worker
from kcache.errors import ConfigError
from kcache.settings import check, setting

DEFAULT_RESOLUTION = (768,)
"""Of a new cache, where none is asked for."""
DEFAULT_MAX_UPSCALE = 2.0
"""Of new sets of shapes, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig(SourceConfig):
    """What `kcache cache-build` is told: what to encode, with which networks, into which form."""

    stage: Stage = setting("all", "Which trainer the cache is for; `all` serves both.")
    resolution: tuple[int, ...] = setting(
        (),
        "Side in pixels of the square pictures whose latents are stored, or of the square that is as large as their "
        "shapes; repeat it for several. What the cache has when left out, 768 for a new one.",
        least=1,
    )
    aspect_ratio_buckets: str | None = setting(
        None,
        'Shapes that pictures are cropped to, whichever keeps most: "auto", "square", or heights and widths such as '
        '"640,896;768,768". What the cache has when left out, squares for a new one.',
    )
    max_upscale: float | None = setting(
        None,
        "Pictures that would have to be enlarged more than so many times have no row in such shapes. What the cache "
        "has when left out, 2 for a new one.",
        above=0,
        below=1e6,
    )
    flip: bool | None = setting(
        None,
        "Store rows of the mirror image of each picture, too. What the cache has when left out, none for a new one.",
    )
    max_train_samples: int | None = setting(
        None, "Take only the first so many samples of the source; what the cache has beside them stays.", least=1
    )
    replace: bool = setting(False, "Let the build go on where most of the samples that the cache has would leave it.")
    alpha: Literal["white", "black", "drop"] = setting(
        "white", "What transparent pixels are laid on; `drop` ignores transparency, as the upstream scripts do."
    )
    color: Literal["srgb", "as-is"] | None = setting(
        None,
        "Convert pictures with a colour profile to sRGB, or take their numbers as they are, like the upstream scripts. "
        "What the cache was begun with when left out, srgb for a new one.",
    )
    max_pixels: int = setting(
        64_000_000, "Pixels of the largest picture that is decoded: a guard of memory against bombs.", least=1
    )
    pretrained_prior_model_name_or_path: str = setting(
        PRIOR_REPO, "Folder or Hub id with image_encoder, text_encoder and tokenizer."
    )
    pretrained_decoder_model_name_or_path: str = setting(DECODER_REPO, "Folder or Hub id with movq.")
    revision: str | None = setting(None, "Branch, tag or commit of the Hub repositories, if it is the same of both.")
    prior_revision: str | None = setting(None, "Branch, tag or commit of the prior's Hub repository.")
    decoder_revision: str | None = setting(None, "Branch, tag or commit of the decoder's Hub repository.")
    # No word is cut off either way; part of the recipe, as results differ by 1e-6 between lengths.
    text_padding: Literal["full", "trimmed"] = setting(
        "full", "Pad each caption to the tokenizer's whole length, or trimmed: to the next multiple of 8 tokens."
    )
    mixed_precision: MixedPrecision = setting("no", "Dtype that the encoders run in; `no` is float32.")
    batch_size: int = setting(
        16, "Inputs per encoder call. It is part of the recipe: rows differ by 1e-6 between batch sizes.", least=1
    )
    device: str | None = setting(None, "Where the encoders run, such as cuda:0. Chosen by what there is when left out.")
    format: Literal["zarr", "webdataset"] = setting("zarr", "Form of the shards on disk.")
    dtype: Literal["float16", "float32"] = setting("float16", "Dtype of the stored rows.")
    rows_per_shard: int | None = setting(None, "Rows of one shard. What makes about 256 MB when left out.", least=1)
    num_workers: int | None = setting(None, "Threads that decode images. One per core when left out.", least=1)
    # It only decides which shards this builder begins with: any number of builders may come and go.
    worker: str | None = setting(
        None, "Which of several builders this is, as I/N counted from 0. Asked of torchrun or Slurm when left out."
    )
    take_over: bool = setting(
        False, "Take over the shards of builders elsewhere at once, without waiting for their leases to run out."
    )
    engine: Literal["local", "ray"] = setting(
        "local", "Who encodes: this process, or `ray`, the machines of a Ray cluster (pip install 'kcache[ray]')."
    )
    address: str | None = setting(
        None,
        "HOST:PORT of the Ray cluster: the one that runs here when left out, else one that is started for this build, "
        "as `local` always does.",
        beside=("engine",),
    )
    rehash: bool = setting(
        False, "Read every file again, instead of trusting that an unchanged size and time mean unchanged content."
    )
    retry_rejected: bool = setting(False, "Try again the inputs that an earlier build rejected.")

    def __post_init__(self) -> None:
        check(self)
        check_worker(self.worker)
        _ = self.controls  # refused now, if they are none
        if self.worker is not None and self.engine != "local":
            raise ConfigError(
                f"--worker is {self.worker!r}, but --engine {self.engine} hands out all shards itself; expected one "
                "process to start the build; leave --worker out"
            )
        if self.aspect_ratio_buckets not in (None, "auto", "square"):
            parse_shapes(self.aspect_ratio_buckets)

    @property
    def compute_dtype(self) -> str:
        """The dtype that the encoders run in, by torch's name."""
        return COMPUTE_DTYPES[self.mixed_precision]
