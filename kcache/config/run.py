"""What a training run of either network is told to do."""

from dataclasses import dataclass, field
from typing import Literal

from kcache.config.source import SourceConfig
from kcache.config.words import LrScheduler, MixedPrecision, OptimizerName
from kcache.settings import marked, setting


@dataclass(frozen=True, kw_only=True)
class RunConfig(SourceConfig):
    """What `kcache train-prior` and `kcache train-decoder` both are told; names and defaults as upstream has them."""

    stage: Literal["prior", "decoder"] = field(
        metadata=marked("Which network learns.", kept=True, shown="never", swept=False, flag=False)
    )
    output_dir: str = field(
        metadata=marked(
            "Run directory: configuration, metrics, checkpoints and the trained network.", shown="never", swept=False
        )
    )
    pretrained_prior_model_name_or_path: str | None = setting(
        None, "Prior pipeline: folder or Hub id. The cache's own when left out.", shown="never"
    )
    pretrained_decoder_model_name_or_path: str | None = setting(
        None, "Decoder pipeline: folder or Hub id. The cache's own when left out.", shown="never"
    )
    revision: str | None = setting(None, "Branch, tag or commit of the Hub repository of what is trained.")
    prior_revision: str | None = setting(None, "Branch, tag or commit of the prior's Hub repository.", shown="never")
    decoder_revision: str | None = setting(
        None, "Branch, tag or commit of the decoder's Hub repository.", shown="never"
    )
    cache_dir: str | None = setting(
        None, "Folder for downloaded repositories. The Hub's own (HF_HOME) when left out.", shown="never"
    )
    export_pipeline: bool = setting(
        False,
        "Copy the unchanged frozen networks into the result, instead of linking to where they are.",
        shown="never",
    )
    train_batch_size: int = setting(1, "Samples per device and forward pass.", least=1, shown="always")
    gradient_accumulation_steps: int = setting(1, "Forward passes per optimizer step.", least=1, shown="always")
    num_train_epochs: int = setting(100, "Passes over the samples.", least=1)
    max_train_steps: int | None = setting(None, "Optimizer steps; overrides --num-train-epochs.", least=1)
    checkpointing_steps: int = setting(
        500, "Optimizer steps between checkpoints; there is one of the last step in any case.", least=1
    )
    checkpoints_total_limit: int | None = setting(
        None, "Keep only the newest so many checkpoints. All are kept when left out.", least=1
    )
    resume_from_checkpoint: str | None = setting(None, "Path of a checkpoint, or `latest`.", shown="never", swept=False)
    new_order: bool = setting(
        False,
        "Go on from a checkpoint's weights in a new order, where the cache or the selection of samples has changed.",
        shown="never",
        swept=False,
        beside=("resume_from_checkpoint",),
    )
    learning_rate: float = setting(1e-4, "Peak learning rate.", least=0, kept=True, shown="always")
    lr_scheduler: LrScheduler = setting("constant", "Schedule by its name in diffusers.", kept=True, shown="always")
    lr_warmup_steps: int = setting(
        500,
        "Optimizer steps of warm-up, for the schedules that have one: all but `constant`.",
        least=0,
        kept=True,
        beside=("lr_scheduler",),
        lenient=True,
    )
    adam_beta1: float = setting(0.9, "Decay of the mean of gradients.", least=0, below=1, kept=True)
    adam_beta2: float = setting(0.999, "Decay of the mean of squared gradients.", least=0, below=1, kept=True)
    adam_weight_decay: float = setting(0.0, "Weight decay, of every optimizer.", least=0, kept=True)
    adam_epsilon: float = setting(1e-8, "Added to the denominator of an update.", least=0, kept=True)
    # No gradient is scaled down to nothing, as 0 would have it: whoever wants none scaled gives a large one.
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this norm before each optimizer step.", above=0, kept=True
    )
    optimizer: OptimizerName = setting(
        "adamw",
        "What moves the weights: AdamW, or one whose state takes less memory, or that finds its learning rate.",
        kept=True,
    )
    use_8bit_adam: bool = setting(False, "The same as --optimizer adamw-8bit.", kept=True)
    weights: Literal["fp32", "bf16"] = setting(
        "fp32",
        "Dtype of what learns when a whole network does. bf16 takes half the memory, and is rounded stochastically.",
        kept=True,
    )
    fused_backward: bool = setting(
        False,
        "Move each weight as soon as the backward pass has its gradient, and free that. Gradients are not scaled down.",
        kept=True,
    )
    offload_optimizer: bool = setting(False, "Keep the optimizer's state in the memory of the machine.")
    use_ema: bool = setting(
        False,
        "Average the weights over the steps. The average is the result, and the raw weights stay beside it.",
        kept=True,
    )
    ema_decay: float = setting(
        0.9999,
        "Share of itself that the average keeps in a step, once it is warm.",
        share=True,
        kept=True,
        beside=("use_ema",),
    )
    ema_device: Literal["cpu"] | None = setting(
        None, "Where the average lies: cpu. Where the network is when left out.", beside=("use_ema",)
    )
    lora_rank: int | None = setting(
        None,
        "Train low-rank adapters of this rank. The network's own weights are trained when left out.",
        least=1,
        kept=True,
    )
    lora_alpha: float | None = setting(
        None,
        "The adapters' output is scaled by alpha / rank. As large as the rank when left out.",
        above=0,
        kept=True,
        beside=("lora_rank",),
    )
    use_dora: bool = setting(
        False,
        "Let adapters learn the length of each row of a weight beside its direction: DoRA.",
        kept=True,
        beside=("lora_rank",),
    )
    use_rslora: bool = setting(
        False,
        "Scale adapters by alpha / √rank, which keeps large ranks learning: rsLoRA.",
        kept=True,
        beside=("lora_rank",),
    )
    lora_dropout: float = setting(
        0.0,
        "Share of the adapters' inputs that are zeroed in training.",
        least=0,
        below=1,
        kept=True,
        beside=("lora_rank",),
    )
    lora_target_modules: tuple[str, ...] = setting(
        (),
        "A layer that gets adapters, such as to_q; repeat it. All of the attention when left out.",
        kept=True,
        beside=("lora_rank",),
    )
    snr_gamma: float | None = setting(
        None,
        "Min-SNR weighting (arXiv 2303.09556), 5.0 in the paper. All timesteps weigh alike when left out.",
        above=0,
        kept=True,
    )
    mixed_precision: MixedPrecision = setting(
        "no", "Autocast dtype of forward and backward; --weights has that of what learns.", kept=True
    )
    allow_tf32: bool = setting(False, "Let float32 matrix products use TF32 on CUDA.")
    gradient_checkpointing: bool = setting(
        False, "Compute activations again in the backward pass: less memory, more time."
    )
    attention: Literal["sdpa", "xformers"] = setting(
        "sdpa", "Who computes attention: torch's own kernels, or xformers."
    )
    compile: bool = setting(
        False, "Let torch.compile make kernels for the network's blocks: the first steps wait for them."
    )
    validation_epochs: int = setting(
        5, "Passes over the samples between validations; there is always one at the end.", least=1
    )
    validation_steps: int | None = setting(
        None,
        "Optimizer steps between validations; overrides --validation-epochs.",
        least=1,
        beside=("val_fraction", "validation_prompts"),
    )
    val_fraction: float = setting(
        0.0, "Share of the images held out for validation, the same ones in every run.", share=True, kept=True
    )
    validation_prompts: tuple[str, ...] = setting(
        (), "A prompt that is drawn at each validation, always from the same noise; repeat it.", shown="never"
    )
    num_validation_images: int | None = setting(
        None,
        "Pictures per validation prompt, one when left out; with --inpaint or --hint held-out pictures that are drawn "
        "anew at each validation, four when left out, none with 0.",
        least=0,
        beside=("validation_prompts", "inpaint", "hint"),
        lenient=True,
    )
    validation_clip_score: bool = setting(
        False,
        "Say of each picture of a validation prompt how well it fits: the cosine of both, by the prior's CLIP.",
        beside=("validation_prompts",),
        lenient=True,
    )
    report_to: str = setting(
        "tensorboard",
        "Tracker beside metrics.jsonl: tensorboard (if installed), wandb, comet_ml, …, `all` or `none`.",
        shown="never",
    )
    tracker_project_name: str = setting("text2image-fine-tune", "What the tracker calls the project.", shown="never")
    logging_dir: str = setting("logs", "Folder in the run directory for trackers that write files.", shown="never")
    push_to_hub: bool = setting(
        False,
        "Upload the result to the Hub when training is done; set HF_TOKEN, or run `hf auth login`, before.",
        shown="never",
    )
    hub_model_id: str | None = setting(
        None,
        "Repository to upload to, such as me/fox. Yours, named like the run directory, when left out.",
        shown="never",
        beside=("push_to_hub",),
        lenient=True,
    )
    residency: Literal["auto", "gpu", "ram", "mmap", "stream"] = setting(
        "auto",
        "Where the rows wait: whole tables on the GPU or in RAM, mapped files, or a few windows of a streamed order. "
        "`auto` decides by size.",
        shown="never",
    )
    shuffle: Literal["full", "block", "stream"] = setting(
        "full",
        "A new permutation of all samples each epoch, or of blocks of neighbours for slow disks, or for streaming.",
        kept=True,
    )
    stage_bytes: int | None = setting(
        None,
        "Memory in bytes that a process takes to stream into; half of what is free, shared out, when left out. With "
        "--stage-dir the most bytes that are copied there; what has room there when left out.",
        least=1,
        shown="never",
        beside=("shuffle", "stage_dir"),
    )
    stage_dir: str | None = setting(
        None,
        "Folder on a disk of this machine, to which `auto` copies the shards that fit neither the GPU nor memory, once "
        "for all runs that give it. Streamed, or mapped where they are, when left out.",
        shown="never",
        swept=False,
    )
    seed: int = setting(
        0, "Decides order, captions, noise and timesteps.", least=0, below=2**63, kept=True, shown="always"
    )
    deterministic: bool = setting(
        False, "Use only deterministic CUDA kernels, so that a run can be repeated bit for bit."
    )
    where: str | None = setting(
        None, 'Train only on samples for which this holds, such as "width >= 512 and tokens <= 40".'
    )
    online: str | None = setting(
        None,
        "A source, as for cache-build, with the flags of a source: run the frozen encoders in the loop instead of "
        "reading their rows.",
        shown="never",
    )
