"""A file of LoRA adapters: which network they are of, and what they make of it. Nothing is unpickled or fetched.

PEFT's format, and that of the diffusers scripts before 0.30 (keys like "….processor.to_q_lora.down.weight"). Modules
that learnt whole stand beside the adapters under their own names, as PEFT's `modules_to_save` do.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from kcache.errors import ModelError
from kcache.hints import broken_link
from kcache.objectives.widening import LEARNT_WHOLE, is_plain

WEIGHTS_FILE: str = LORA_WEIGHT_NAME_SAFE
"""The adapters' file in a folder: pytorch_lora_weights.safetensors."""
METADATA_KEY = "lora_adapter_metadata"
"""Where its metadata has PEFT's settings."""

_PRIOR_PARTS = {
    "embedding_proj",
    "encoder_hidden_states_proj",
    "proj_in",
    "proj_to_clip_embeddings",
    "transformer_blocks",
}
_UNET_PARTS = {"add_embedding", "down_blocks", "encoder_hid_proj", "mid_block", "up_blocks"}
_KEY = re.compile(r"(.+)\.lora_([AB])\.weight")
_MAGNITUDE = "lora_magnitude_vector"
_IS_WHOLE = re.compile("|".join(re.escape(f"{module}.") for module in LEARNT_WHOLE))
_LEGACY_KEY = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out|add_[kv]_proj)_lora\.(down|up)\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """What a file of adapters holds."""

    file: Path
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """A (rank, inputs) and B (outputs, rank), by the name of the layer they adapt."""
    rank: int
    alpha: float
    rslora: bool
    """Whether they are scaled by alpha / √rank instead of alpha / rank."""
    magnitudes: Mapping[str, Tensor]
    """Of DoRA the length of each row of an adapted weight, (outputs,), by the name of its layer; else empty."""
    whole: Mapping[str, Tensor]
    """What a decoder that was widened has learnt whole, by the name of the parameter; else empty."""

    @property
    def widening(self) -> dict[str, Any]:
        """The entries of a decoder's configuration that are others than a plain one's where these widen it; or none."""
        if not self.whole:
            return {}
        hints = any(name.startswith(f"{LEARNT_WHOLE[1]}.") for name in self.whole)
        changed = {"addition_embed_type": "image_hint"} if hints else {}
        return {"in_channels": self.whole["conv_in.weight"].shape[1]} | changed

    def applied_to(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the configuration of a network becomes with these; raises ModelError where it cannot be widened."""
        if self.whole and not is_plain(config):
            raise ModelError(
                f"{self.file} makes a plain decoder a wider one, with a conv_in of its own; found a network of "
                f"{config.get('in_channels')} input channels; expected the one that it was trained on, of 4; give "
                "that, and no other LoRA that widens it"
            )
        return {**config, **self.widening}


def read_adapters(path: Path) -> Adapters:
    """The adapters in a file, or in the file that a folder has; raises ModelError for what is no LoRA of one rank."""
    file = _find_file(path)
    try:
        tensors = {_peft_key(key): tensor for key, tensor in load_file(file).items()}
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file} cannot be read ({error}); expected a whole safetensors file; save or copy it again"
        ) from error
    layers = sorted({match[1] for match in map(_KEY.fullmatch, tensors) if match})
    halves = {f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"}
    if any(key.endswith(f".{_MAGNITUDE}") for key in tensors):
        halves |= {f"{layer}.{_MAGNITUDE}" for layer in layers}
    whole = {key: tensor for key, tensor in tensors.items() if _IS_WHOLE.match(key) and key not in halves}
    wrong = sorted((tensors.keys() - whole.keys()) ^ halves)
    if whole and ("conv_in.weight" not in whole or whole["conv_in.weight"].ndim != 4):
        wrong += whole
    if wrong or not layers:
        raise ModelError(
            f"{file} holds no LoRA: found {len(tensors)} tensors, {len(wrong)} of them of other names or without their "
            f"other half{f', such as {wrong[0]}' if wrong else ''}; expected pairs such as "
            "transformer_blocks.0.attn1.to_q.lora_A.weight and ….lora_B.weight; save it with save_lora_adapter"
        )
    pairs = {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}
    first, _ = pairs[layers[0]]
    rank = len(first) if first.ndim else 0
    magnitudes = {layer: tensors[key] for layer in layers if (key := f"{layer}.{_MAGNITUDE}") in tensors}
    alpha, rslora = _scale(file, metadata, rank, bool(magnitudes))
    return Adapters(file=file, pairs=pairs, rank=rank, alpha=alpha, rslora=rslora, magnitudes=magnitudes, whole=whole)


def adapted_network(path: Path) -> Literal["prior", "unet"]:
    """Which network of Kandinsky 2.2 the adapters in `path`, a file or a folder with one, are for.

    Raises ModelError for a file that cannot be read, and for adapters whose layers are in neither network or in both.
    """
    adapters = read_adapters(path)
    parts = {layer.split(".")[0] for layer in adapters.pairs}
    in_prior, in_unet = bool(parts & _PRIOR_PARTS), bool(parts & _UNET_PARTS)
    if in_prior == in_unet:
        raise ModelError(
            f"{adapters.file} adapts layers in {', '.join(sorted(parts))}; expected some in transformer_blocks, of "
            "Kandinsky 2.2's prior, or in down_blocks, mid_block and up_blocks, of its decoder; give a LoRA of one"
        )
    return "prior" if in_prior else "unet"


def _find_file(path: Path) -> Path:
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        found = "is no .safetensors file" if file.exists() else "does not exist"
        if (broken := broken_link(file)) is not None:
            found = f"does not exist: {broken}"
        raise ModelError(
            f"{file} {found}; expected adapters in safetensors format; give the run directory of a LoRA training, or "
            "its file (kcache unpickles nothing: save a .bin again as safetensors)"
        )
    return file


def _peft_key(key: str) -> str:
    legacy = _LEGACY_KEY.fullmatch(key)
    if legacy is None:
        return key
    attention, projection, half = legacy.groups()
    projection = "to_out.0" if projection == "to_out" else projection
    return f"{attention}.{projection}.lora_{'A' if half == 'down' else 'B'}.weight"


def _scale(file: Path, metadata: Mapping[str, str], rank: int, dora: bool) -> tuple[float, bool]:
    """The alpha and use_rslora that the metadata of `file` state; without metadata the rank, as in the older scripts.

    Raises ModelError for what cannot be read or is no scale, and where they say otherwise than the tensors of `dora`.
    """
    if METADATA_KEY not in metadata:
        return rank, False
    # Of PEFT's settings only these are followed: it would take orders from the others, such as a module to import.
    try:
        settings = json.loads(metadata[METADATA_KEY])
        alpha = float(settings["lora_alpha"])
        odd = [name for name in ("alpha_pattern", "rank_pattern") if settings.get(name)]
        rslora, told = bool(settings.get("use_rslora")), bool(settings.get("use_dora"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(
            f"the metadata of {file} cannot be read ({error!r}); expected PEFT's settings with a lora_alpha; save it "
            "again with save_lora_adapter"
        ) from error
    if told is not dora:
        raise ModelError(
            f"{file} says use_dora {str(told).lower()}; found {'' if dora else 'no '}magnitudes beside its adapters; "
            "expected both or neither; save it again with save_lora_adapter"
        )
    if odd or not math.isfinite(alpha):
        raise ModelError(
            f"{file} was made with {', '.join(odd) or f'lora_alpha {alpha}'}; expected all adapters of one "
            "rank and one finite alpha; fuse it into its network by the tool that made it"
        )
    return alpha, rslora
