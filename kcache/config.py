"""What a build and a training run are told to do: frozen settings, named like the flags that set them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from kcache.errors import ConfigError

Stage = Literal["prior", "decoder", "all"]
MixedPrecision = Literal["no", "fp16", "bf16"]
LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

PRIOR_REPO = "kandinsky-community/kandinsky-2-2-prior"
DECODER_REPO = "kandinsky-community/kandinsky-2-2-decoder"
CountReport = Callable[[str, int, int], None]
"""Called with what is being worked on, how much of it is done, and how much there is."""


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}; expected a probability, 0 to 1")


def _is_place(worker: str) -> bool:
    index, _, count = worker.partition("/")
    return index.isdecimal() and count.isdecimal() and int(index) < int(count)


def _check_at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not least <= value < math.inf:
        raise ConfigError(f"{name} is {value}; expected {least} or more")


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}; expected a number above 0")


def _check_below_one(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} is {value}; expected 0 or more, and less than 1")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What `kcache cache-build` is told: what to encode, with which networks, into which form."""

    stage: Stage = "all"
    """Which trainer the cache is for: "prior" (image_embeds, text), "decoder" (image_embeds, latents) or "all"."""
    format: Literal["zarr", "webdataset"] = "zarr"
    """Form of the shards on disk: "zarr" is the working cache, "webdataset" joined samples in tars, to publish."""
    resolution: tuple[int, ...] = (768,)
    """Sides of the square pictures, in pixels, whose latents are stored; one table each."""
    dtype: Literal["float16", "float32"] = "float16"
    """Dtype of the stored rows."""
    mixed_precision: MixedPrecision = "no"
    """Dtype that the encoders run in: "no" is float32."""
    pretrained_prior_model_name_or_path: str = PRIOR_REPO
    """Folder or Hub id that holds image_encoder, image_processor, text_encoder and tokenizer."""
    pretrained_decoder_model_name_or_path: str = DECODER_REPO
    """Folder or Hub id that holds movq."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repositories."""
    image_column: str = "image"
    """Column of a dataset that holds the image."""
    caption_column: str = "text"
    """Column of a dataset or metadata file that holds the caption or the list of captions."""
    max_train_samples: int | None = None
    """Take only the first so many samples of the source."""
    batch_size: int = 16
    """Inputs per encoder call; part of the recipe, as results differ by 1e-6 between batch shapes."""
    num_workers: int | None = None
    """Threads that decode images; None takes one per core."""
    rows_per_shard: int | None = None
    """Rows of one shard; None takes what makes about 256 MB, per table."""
    alpha: Literal["white", "black", "drop"] = "white"
    """What transparent pixels are laid on; "drop" ignores transparency as the upstream scripts do."""
    text_padding: Literal["full", "trimmed"] = "full"
    """How far captions are padded for the text encoder: "full" as upstream, "trimmed" to the next multiple of 8 tokens.

    No word is cut off either way; part of the recipe, as results differ by 1e-6 between lengths."""
    device: str | None = None
    """Where the encoders run, e.g. "cuda:0"; None takes CUDA, then MPS, then the CPU."""
    worker: str | None = None
    """Which of several builders of one cache this is, "I/N" counted from 0; None asks torchrun's or Slurm's variables.

    It only decides which shards this builder begins with: any number of builders may come and go."""
    rehash: bool = False
    """Read every file again to digest it, instead of trusting an unchanged (inode, size, mtime, ctime)."""
    retry_rejected: bool = False
    """Try again the inputs that an earlier build rejected."""

    def __post_init__(self) -> None:
        _check_choice("--stage", self.stage, get_args(Stage))
        _check_choice("--format", self.format, ("zarr", "webdataset"))
        _check_choice("--dtype", self.dtype, ("float16", "float32"))
        _check_choice("--mixed-precision", self.mixed_precision, get_args(MixedPrecision))
        _check_choice("--alpha", self.alpha, ("white", "black", "drop"))
        _check_choice("--text-padding", self.text_padding, ("full", "trimmed"))
        _check_at_least("--batch-size", self.batch_size, 1)
        _check_at_least("--num-workers", self.num_workers, 1)
        _check_at_least("--rows-per-shard", self.rows_per_shard, 1)
        _check_at_least("--max-train-samples", self.max_train_samples, 1)
        if self.worker is not None and not _is_place(self.worker):
            raise ConfigError(
                f"--worker is {self.worker!r}; expected I/N, builder I of N counted from 0, such as 0/4 to 3/4"
            )
        if not self.resolution:
            raise ConfigError("no --resolution given; expected at least one, e.g. --resolution 768")
        for side in self.resolution:
            _check_at_least("--resolution", side, 1)

    @property
    def compute_dtype(self) -> str:
        """The dtype that the encoders run in, by torch's name."""
        return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.mixed_precision]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What `kcache train-prior` and `kcache train-decoder` are told; names and defaults are the upstream scripts'."""

    stage: Literal["prior", "decoder"]
    """Which network learns."""
    output_dir: str
    """The run directory: configuration, metrics, checkpoints and the trained network."""
    pretrained_prior_model_name_or_path: str | None = None
    """Folder or Hub id of the prior pipeline; None takes the one that the cache was built with."""
    pretrained_decoder_model_name_or_path: str | None = None
    """Folder or Hub id of the decoder pipeline; None takes the one that the cache was built with."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repositories."""
    cache_dir: str | None = None
    """Where downloaded repositories are kept; None takes the Hub's own place (HF_HOME)."""
    resolution: int | None = None
    """Which latents table the decoder reads, in pixels; None takes the only one there is."""
    where: str | None = None
    """Train only on samples for which this holds, e.g. "width >= 512 and tokens <= 40"; see `Cache.where`."""
    val_fraction: float = 0.0
    """Share of images held out for validation: the same ones in every run, whatever is added to the cache."""
    caption_dropout: float = 0.0
    """Share of samples that the prior sees without their caption, for classifier-free guidance."""
    image_dropout: float = 0.0
    """Share of samples that the decoder sees without their image_embeds, for classifier-free guidance."""
    online: str | None = None
    """A source: run the frozen encoders in the loop instead of reading their rows (the baseline, and the proof)."""
    image_column: str = "image"
    """Column of the `online` source that holds the image."""
    caption_column: str = "text"
    """Column of the `online` source that holds the captions; those trained on are the cache's."""
    seed: int = 0
    """Decides order, captions, noise and timesteps."""
    train_batch_size: int = 1
    """Samples per device and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    num_train_epochs: int = 100
    """Passes over the samples, unless max_train_steps is given."""
    max_train_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_scheduler: LrScheduler = "constant"
    """Schedule of diffusers' get_scheduler."""
    lr_warmup_steps: int = 500
    """Optimizer steps of warm-up, for the schedules that have one."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm before each optimizer step."""
    use_8bit_adam: bool = False
    """Keep AdamW's state in 8 bits, by bitsandbytes."""
    use_ema: bool = False
    """Keep an exponential moving average of the weights: it becomes the result, the raw weights stay beside it."""
    ema_decay: float = 0.9999
    """Share of itself that the average keeps in a step, reached after some thousand steps of warm-up."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank and leave the network's own weights; None trains those."""
    lora_alpha: float | None = None
    """The adapters' output is scaled by alpha / rank; None takes the rank, which scales by 1."""
    lora_dropout: float = 0.0
    """Share of the adapters' inputs that are zeroed in training."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the layers that get adapters; empty takes all projections of the attention."""
    snr_gamma: float | None = None
    """Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); 5.0 is the paper's value, None weighs all alike."""
    mixed_precision: MixedPrecision = "no"
    """Autocast dtype of forward and backward; weights and optimizer stay float32."""
    allow_tf32: bool = False
    """Let float32 matrix products use TF32 on CUDA."""
    gradient_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, more time."""
    packing: bool = True
    """Run the prior on valid tokens only and leave padding out: the same result from a quarter of the arithmetic."""
    noise_draws: int = 1
    """Draws of noise and timestep that the prior learns from per caption and step; packed, they share its text."""
    compile: bool = False
    """Let torch.compile make kernels for the network's repeated blocks: the first steps wait for them."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Who computes attention: torch's scaled_dot_product_attention, or xformers."""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Keep only the newest so many checkpoints; None keeps all."""
    resume_from_checkpoint: str | None = None
    """A checkpoint's path, or "latest"."""
    validation_epochs: int = 5
    """Passes over the samples between validations; there is always one at the end."""
    validation_steps: int | None = None
    """Optimizer steps between validations; overrides validation_epochs."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts that are drawn at each validation, always from the same noise."""
    num_validation_images: int = 1
    """Pictures per validation prompt."""
    report_to: str = "tensorboard"
    """Tracker beside metrics.jsonl, by accelerate's name: tensorboard (if installed), wandb, …, "all" or "none"."""
    tracker_project_name: str = "text2image-fine-tune"
    """What the tracker calls the project."""
    logging_dir: str = "logs"
    """Folder in the run directory for trackers that write files."""
    push_to_hub: bool = False
    """Upload the result when training is done; the token comes from HF_TOKEN or `hf auth login`."""
    hub_model_id: str | None = None
    """Repository to upload to; None takes the run directory's name, under the token's owner."""
    residency: Literal["auto", "gpu", "ram", "mmap"] = "auto"
    """Where the rows wait: whole tables on the GPU or in RAM, or memory-mapped files; "auto" decides by size."""
    shuffle: Literal["full", "block"] = "full"
    """A new permutation of all samples each epoch, or of blocks of neighbours for slow disks."""
    deterministic: bool = False
    """Use only deterministic CUDA kernels, so that a run can be repeated bit for bit."""
    export_pipeline: bool = False
    """Copy the unchanged frozen networks into the result, instead of linking to where they are."""

    def __post_init__(self) -> None:
        _check_choice("stage", self.stage, ("prior", "decoder"))
        _check_choice("--mixed-precision", self.mixed_precision, get_args(MixedPrecision))
        _check_choice("--lr-scheduler", self.lr_scheduler, get_args(LrScheduler))
        _check_choice("--attention", self.attention, ("sdpa", "xformers"))
        _check_choice("--residency", self.residency, ("auto", "gpu", "ram", "mmap"))
        _check_choice("--shuffle", self.shuffle, ("full", "block"))
        for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "checkpointing_steps"):
            _check_at_least("--" + name.replace("_", "-"), getattr(self, name), 1)
        _check_probability("--caption-dropout", self.caption_dropout)
        _check_probability("--image-dropout", self.image_dropout)
        if self.stage == "decoder" and self.caption_dropout:
            raise ConfigError("--caption-dropout is for the prior; the decoder reads no captions: give --image-dropout")
        if self.stage == "prior" and self.image_dropout:
            raise ConfigError("--image-dropout is for the decoder; for the prior the image is the target")
        _check_at_least("--noise-draws", self.noise_draws, 1)
        if self.stage == "decoder" and self.noise_draws > 1:
            raise ConfigError(
                "--noise-draws is for the prior, whose draws share the caption's tokens; the decoder has nothing to "
                "share: give a larger --train-batch-size"
            )
        if self.compile and self.deterministic:
            raise ConfigError(
                "--compile with --deterministic: torch.compile chooses its kernels on each machine anew, so that a run "
                "need not be repeated bit for bit; expected one of the two; give --no-compile or --no-deterministic"
            )
        if self.online is None and (self.image_column, self.caption_column) != ("image", "text"):
            raise ConfigError(
                "--image-column and --caption-column say how to read the source of --online; without it the cache "
                "decides what is trained on; give them when it is built: kcache cache-build SOURCE CACHE"
            )
        _check_at_least("--max-train-steps", self.max_train_steps, 1)
        _check_at_least("--validation-epochs", self.validation_epochs, 1)
        _check_at_least("--validation-steps", self.validation_steps, 1)
        if self.validation_steps is not None and not (self.val_fraction or self.validation_prompts):
            raise ConfigError(
                "--validation-steps says when, but not what to look at; expected --val-fraction, --validation-prompts "
                "or both beside it"
            )
        _check_at_least("--num-validation-images", self.num_validation_images, 1)
        _check_probability("--val-fraction", self.val_fraction)
        _check_probability("--ema-decay", self.ema_decay)
        self._check_lora()
        self._check_optimizer()
        _check_at_least("--checkpoints-total-limit", self.checkpoints_total_limit, 1)
        _check_at_least("--seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ConfigError(f"--seed is {self.seed}; expected a number below 2^63")

    def _check_optimizer(self) -> None:
        _check_at_least("--learning-rate", self.learning_rate, 0)
        _check_at_least("--lr-warmup-steps", self.lr_warmup_steps, 0)
        _check_below_one("--adam-beta1", self.adam_beta1)
        _check_below_one("--adam-beta2", self.adam_beta2)
        _check_at_least("--adam-weight-decay", self.adam_weight_decay, 0)
        _check_at_least("--adam-epsilon", self.adam_epsilon, 0)
        # No gradient is scaled down to nothing, as 0 would have it: whoever wants none scaled gives a large one.
        _check_positive("--max-grad-norm", self.max_grad_norm)
        _check_positive("--snr-gamma", self.snr_gamma)

    def _check_lora(self) -> None:
        _check_at_least("--lora-rank", self.lora_rank, 1)
        _check_positive("--lora-alpha", self.lora_alpha)
        _check_below_one("--lora-dropout", self.lora_dropout)
        if self.lora_rank is not None:
            return
        given = {
            "--lora-alpha": self.lora_alpha is not None,
            "--lora-dropout": self.lora_dropout > 0,
            "--lora-target-modules": bool(self.lora_target_modules),
        }
        for flag, is_given in given.items():
            if is_given:
                raise ConfigError(f"{flag} is for adapters; expected a --lora-rank beside it, e.g. --lora-rank 16")
