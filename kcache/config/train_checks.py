"""What a training run cannot be told to do: settings that each make sense, and not together."""

from collections import Counter
from typing import TYPE_CHECKING

from kcache.errors import ConfigError

if TYPE_CHECKING:
    from kcache.config.train import TrainConfig


CLASS_PICTURES = (
    "what the decoder is to keep are pictures; draw some of the class by kcache sample PROMPT PROMPT --output-dir "
    "CLASS, build a cache of them like yours by kcache cache-build CLASS, merge both by kcache cache-merge, and train "
    "on that"
)
"""What to do instead of --class-prompt."""


def check_run(config: "TrainConfig") -> None:
    """Raise ConfigError for the first two settings that do not go together."""
    _check_stage(config)
    if config.compile and config.deterministic:
        raise ConfigError(
            "--compile with --deterministic: torch.compile chooses its kernels on each machine anew, so that a run "
            "need not be repeated bit for bit; expected one of the two; give --no-compile or --no-deterministic"
        )
    if config.online is None and config.flags:
        raise ConfigError(
            f"{' and '.join(config.flags)} say how to read the source of --online; without it the cache decides what "
            "is trained on; give them when it is built: kcache cache-build SOURCE CACHE"
        )
    if config.counts:
        raise ConfigError(
            f"{' and '.join(f'--{name}-column' for name in config.counts)} with --online: how much a sample counts and "
            "how often it comes is the cache's; leave it out here, and give it when the cache is built"
        )
    if config.online is not None and config.residency != "auto":
        raise ConfigError(
            f"--residency {config.residency} says where the rows of a cache wait; with --online there are none, as "
            "the encoders make them; expected one of the two; leave --residency out"
        )
    if config.residency == "stream" and config.shuffle != "stream":
        raise ConfigError(
            f"--residency stream with --shuffle {config.shuffle}, which wants rows from everywhere at any time; "
            "expected an order that is read in blocks; give --shuffle stream"
        )
    if config.stage_dir is not None and (config.online is not None or config.residency != "auto"):
        other = f"--residency {config.residency}" if config.online is None else "--online"
        raise ConfigError(
            f"--stage-dir {config.stage_dir} with {other}: it is where --residency auto copies rows of a cache to, "
            "which fit neither the GPU nor memory; expected one of the two; leave the other out"
        )
    if config.validation_prompts and config.num_validation_images == 0:
        raise ConfigError(
            "--num-validation-images 0 with --validation-prompts, of which nothing would be drawn; expected 1 or more "
            "beside them; leave one of the two out"
        )
    _check_memory(config)
    _check_class_prompts(config)
    _check_revisions(config)


def _check_memory(config: "TrainConfig") -> None:
    """What takes less memory in training a whole network."""
    if config.use_8bit_adam and config.optimizer not in ("adamw", "adamw-8bit"):
        raise ConfigError(
            f"--use-8bit-adam with --optimizer {config.optimizer}; expected one optimizer, and --use-8bit-adam is "
            "--optimizer adamw-8bit; leave one of the two out"
        )
    flags = {
        "--weights bf16": config.weights == "bf16",
        "--fused-backward": config.fused_backward,
        "--offload-optimizer": config.offload_optimizer,
    }
    asked = " and ".join(flag for flag, is_on in flags.items() if is_on)
    if asked and config.lora_rank is not None:
        raise ConfigError(
            f"{asked} with --lora-rank {config.lora_rank}: adapters are small, and their base has the dtype of "
            "--mixed-precision already; expected it with a whole network; leave one of the two out"
        )
    if asked and config.chosen_optimizer == "prodigy":
        raise ConfigError(
            f"{asked} with --optimizer prodigy, which looks at all weights at once: one at a time cannot be moved; "
            "expected an optimizer that looks at each alone; give --optimizer adafactor, or another"
        )
    if config.weights == "bf16" and config.mixed_precision != "bf16":
        raise ConfigError(
            f"--weights bf16 with --mixed-precision {config.mixed_precision}; expected bf16 for both, as nothing can "
            "be computed more precisely than the weights are; give --mixed-precision bf16"
        )
    if config.fused_backward:
        _check_fused_backward(config)


def _check_fused_backward(config: "TrainConfig") -> None:
    at_odds = {
        f"--gradient-accumulation-steps {config.gradient_accumulation_steps}": config.gradient_accumulation_steps > 1,
        f"--max-grad-norm {config.max_grad_norm}": config.max_grad_norm != 1.0,
        "--mixed-precision fp16": config.mixed_precision == "fp16",
    }
    for flag, is_on in at_odds.items():
        if is_on:
            raise ConfigError(
                f"--fused-backward with {flag}: each gradient is used and freed as soon as it is there, and that would "
                f"need all of them together; expected one of the two; leave {flag.split()[0]} out, or --fused-backward"
            )


def _check_class_prompts(config: "TrainConfig") -> None:
    prompts = [prompt.strip() for prompt in config.class_prompt]
    if prompts and config.stage == "decoder":
        raise ConfigError(f"--class-prompt is for the prior: {CLASS_PICTURES}")
    if "" in prompts:
        raise ConfigError(
            "--class-prompt is empty; expected what the prior is to keep drawing, such as 'a photo of a dog'; give "
            "that, or leave it out"
        )
    if twice := [prompt for prompt, count in Counter(prompts).items() if count > 1]:
        raise ConfigError(
            f"--class-prompt {twice[0]!r} is given more than once; expected each once; for more rows of all of them "
            "give a larger --num-class-rows"
        )


def _check_revisions(config: "TrainConfig") -> None:
    own, other = f"{config.stage}_revision", "prior_revision" if config.stage == "decoder" else "decoder_revision"
    told = getattr(config, own)
    if None not in (config.revision, told) and config.revision != told:
        raise ConfigError(
            f"--revision is {config.revision} and --{config.stage}-revision {told}: both are of the {config.stage} "
            "that is trained; expected one of the two; leave the other out"
        )
    if getattr(config, other) is not None and not config.validation_prompts:
        raise ConfigError(
            f"--{other.replace('_', '-')} is {getattr(config, other)}, but this run reads no "
            f"{other.removesuffix('_revision')}, which only draws --validation-prompts; expected some beside it; "
            "add a prompt, or leave it out"
        )


def _check_stage(config: "TrainConfig") -> None:
    if config.stage == "decoder" and config.caption_dropout:
        raise ConfigError("--caption-dropout is for the prior; the decoder reads no captions: give --image-dropout")
    if config.stage == "prior" and config.inpaint:
        raise ConfigError("--inpaint is for the decoder, which draws pictures: the prior is the same for all decoders")
    if config.inpaint and config.hint is not None:
        raise ConfigError(
            f"--hint {config.hint} with --inpaint: no decoder of Kandinsky 2.2 reads both; expected one of the "
            "two; leave the other out"
        )
    if config.hint is not None and config.validation_prompts:
        raise ConfigError(
            f"--validation-prompts with --hint {config.hint}: the decoder that draws by a hint draws no picture from a "
            "prompt alone; expected held-out samples to look at, drawn by their own hints at each validation; give "
            "--val-fraction"
        )
    if config.inpaint and config.validation_prompts:
        raise ConfigError(
            "--validation-prompts with --inpaint: the decoder that fills holes draws no picture from a prompt alone; "
            "expected held-out samples to look at, whose holes are filled at each validation, and whose val_hole says "
            "how well; give --val-fraction"
        )
    if config.stage == "prior" and config.image_dropout:
        raise ConfigError("--image-dropout is for the decoder; for the prior the image is the target")
    if config.stage == "decoder" and config.noise_draws > 1:
        raise ConfigError(
            "--noise-draws is for the prior, whose draws share the caption's tokens; the decoder has nothing to "
            "share: give a larger --train-batch-size"
        )
