"""Which decoder a run can begin with, and what is made wider for what it is to learn."""

from collections.abc import Sequence
from typing import NamedTuple

from diffusers import ModelMixin

from kcache.config import DECODER_REPO, DEPTH_REPO, INPAINT_REPO, TrainConfig
from kcache.encoders.repositories import FOLLOWING, INPAINTING, PIPELINES, Repository, pipeline_class
from kcache.errors import ModelError
from kcache.objectives.widening import is_plain, learnt_whole, widen_again, widen_for_hints, widen_for_masks
from kcache.store.run_directory import logger
from kcache.training.optimizer.learning import trainable_parameters

_BASE = "--pretrained-decoder-model-name-or-path"


class _Kind(NamedTuple):
    """What a decoder is for."""

    does: str
    lacks: str
    """What one that is not for it does."""
    flag: str
    """How it is trained as what it is."""
    published: str


_KINDS = {
    PIPELINES["decoder"].class_name: _Kind("draws whole pictures", "", "neither --inpaint nor --hint", DECODER_REPO),
    INPAINTING: _Kind("fills holes", "fills no holes yet", "--inpaint", INPAINT_REPO),
    # The published one has pickled weights alone on its main branch.
    FOLLOWING: _Kind("reads hints", "reads no hints yet", "--hint NAME", f"{DEPTH_REPO} --revision refs/pr/5"),
}
"""By the class of its pipeline."""


def begin(network: ModelMixin, config: TrainConfig, base: Repository) -> tuple[str, ...]:
    """Widen a plain decoder for what it is to learn, say what a run begins with, and which modules are new in part."""
    wanted = _decoder_class(config) if config.stage == "decoder" else None
    if wanted not in (INPAINTING, FOLLOWING):
        return ()
    kind, before = _KINDS[wanted], network.config.in_channels
    asked = "--inpaint" if config.inpaint else f"--hint {config.hint}"
    if not is_plain(network.config):
        logger.warning("%s begins with %s, which %s already", asked, base.name, kind.does)
        return ()
    (widen_for_masks if config.inpaint else widen_for_hints)(network)
    logger.warning(
        "%s begins with %s, which %s: its %d input channels are now %d; to begin with the published decoder that "
        "%s, give %s %s",
        asked,
        base.name,
        kind.lacks,
        before,
        network.config.in_channels,
        "does" if config.inpaint else "reads depths",
        _BASE,
        kind.published,
    )
    return learnt_whole(network)


def go_on(network: ModelMixin, config: TrainConfig, base: Repository) -> None:
    """Let a saved decoder that was widened compute as it did in the run, which began with the plain one of `base`."""
    if config.stage == "decoder" and not is_plain(network.config):
        before = base.read(PIPELINES[config.stage].network).values
        if is_plain(before):
            widen_again(network, before["in_channels"])


def say_whole(network: ModelMixin, whole: Sequence[str]) -> None:
    """Say which modules learn `whole` beside the adapters, and how much that is."""
    if not whole:
        return
    sizes = {name: parameter.numel() for name, parameter in trainable_parameters(network).items()}
    logger.warning(
        "%s: trained whole beside the adapters, at the same learning rate, %s of %s parameters; the LoRA widens the "
        "plain decoder that it is loaded into",
        " and ".join(whole),
        f"{sum(size for name, size in sizes.items() if '.lora_' not in name):,}",
        f"{sum(sizes.values()):,}",
    )


def check_decoder(config: TrainConfig, base: Repository) -> None:
    """Check, before it is loaded, that the decoder of `base` is one that the run of `config` can begin with.

    Raises ModelError.
    """
    if config.stage != "decoder":
        return
    told = base.read(PIPELINES[config.stage].network).values
    inputs, outputs = (told.get(name) for name in ("in_channels", "out_channels"))
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        return  # whoever loads it says so
    found, wanted = pipeline_class("decoder", told), _decoder_class(config)
    kind, asked = _KINDS[found], _KINDS[wanted]
    seen = f"the decoder of {base.name} has {inputs} input channels"
    if found not in (wanted, PIPELINES["decoder"].class_name):
        raise ModelError(
            f"{seen}: it {kind.does}; expected one that {asked.does}; train it on as what it is with {kind.flag}, or "
            f"give another such as {_BASE} {asked.published}"
        )
    if found != wanted and not is_plain(told):
        wider = 9 if config.inpaint else 8
        raise ModelError(
            f"{seen} and {outputs} output channels; expected for {asked.flag} 4 or {wider}, and 8; give a decoder of "
            f"Kandinsky 2.2 such as {_BASE} {asked.published}"
        )


def _decoder_class(config: TrainConfig) -> str:
    """Name of the diffusers class that the run of `config` trains a decoder for."""
    return INPAINTING if config.inpaint else PIPELINES["decoder"].class_name if config.hint is None else FOLLOWING
