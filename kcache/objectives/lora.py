"""LoRA: low-rank adapters beside the frozen linear layers of a network, by PEFT.

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685: a layer with input x has
B·A·x · alpha / rank added to its output, with A (rank, inputs) and B (outputs, rank). Adapters are kept in a file that
diffusers reads by `network.load_lora_adapter(folder, prefix=None, weight_name=WEIGHTS_FILE)`; without `prefix=None` it
finds nothing in it and only warns.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kcache.errors import ConfigError, ModelError
from kcache.hints import broken_link

WEIGHTS_FILE: str = LORA_WEIGHT_NAME_SAFE
"""The adapters' file in a folder: pytorch_lora_weights.safetensors."""

_ADAPTER = "default"
_METADATA_KEY = "lora_adapter_metadata"
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
_PRIOR_PARTS = {
    "embedding_proj",
    "encoder_hidden_states_proj",
    "proj_in",
    "proj_to_clip_embeddings",
    "transformer_blocks",
}
_UNET_PARTS = {"add_embedding", "down_blocks", "encoder_hid_proj", "mid_block", "up_blocks"}
_KEY = re.compile(r"(.+)\.lora_([AB])\.weight")
_LEGACY_KEY = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out|add_[kv]_proj)_lora\.(down|up)\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Adapters:
    """What a file of adapters holds."""

    file: Path
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """A (rank, inputs) and B (outputs, rank), by the name of the layer they adapt."""
    rank: int
    alpha: float


def default_target_modules(network: ModelMixin) -> tuple[str, ...]:
    """The names of all projections in the attention of `network`.

    The decoder's include add_k_proj and add_v_proj, which read the image embedding: without them, what the decoder is
    conditioned on would not be adapted.
    """
    layers = _linear_layers(network)
    return tuple(name for name in _PROJECTIONS if any(layer.endswith(f".{name}") for layer in layers))


def add_lora(
    network: ModelMixin,
    *,
    rank: int,
    alpha: float | None,
    dropout: float,
    target_modules: Sequence[str],
    seed: int,
) -> None:
    """Freeze `network` and give it adapters that learn, float32 whatever its own dtype; its output stays the same.

    `target_modules` are names of linear layers, whole or their last parts; empty takes `default_target_modules`.
    `alpha` None takes the rank. A is drawn from N(0, 1/rank²) by `seed` and nothing else, B is zero. Raises ConfigError
    for a name that no linear layer has, and for a rank above the width of every layer that would get adapters.
    """
    targets = tuple(target_modules) or default_target_modules(network)
    layers = _linear_layers(network)
    unknown = [name for name in targets if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if unknown:
        parts = map(_end, layers)
        raise ConfigError(
            f"--lora-target-modules names {', '.join(unknown)}, which no linear layer of {type(network).__name__} is "
            f"called; expected some of {', '.join(dict.fromkeys(parts))}, or a layer's whole name such as {layers[0]}"
        )
    adapted = [name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets)]
    widest = max(min(network.get_submodule(name).weight.shape) for name in adapted)
    if rank > widest:
        raise ConfigError(
            f"--lora-rank is {rank}; the widest layer that would get adapters has rank {widest} itself; expected at "
            f"most {widest}; give less, or train the whole network without --lora-rank"
        )
    _inject(network, rank, rank if alpha is None else alpha, dropout, targets, seed)


def save_lora(network: ModelMixin, folder: Path, save: Callable[..., None] = save_file) -> None:
    """Write the adapters of `network` to `folder`/pytorch_lora_weights.safetensors, PEFT's settings as metadata.

    Equal adapters give equal bytes. `save` is what writes tensors, to a path, with metadata.
    """
    settings = network.peft_config[_ADAPTER].to_dict()
    # diffusers builds adapters from these, and nothing would switch their dropout off, not even in a pipeline.
    settings["lora_dropout"] = 0.0
    tensors = get_peft_model_state_dict(network, adapter_name=_ADAPTER)
    if settings["lora_alpha"] == int(settings["lora_alpha"]):
        settings["lora_alpha"] = int(settings["lora_alpha"])
    # Not as they were asked for, which adapters that were loaded do not know any more.
    settings["target_modules"] = _targets(network, {name.partition(".lora_")[0] for name in tensors})
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)  # PEFT keeps names in sets
    folder.mkdir(parents=True, exist_ok=True)
    # Not by diffusers' save_lora_adapter, which warns of a cast that it does not make.
    save(tensors, folder / WEIGHTS_FILE, {_METADATA_KEY: text})


def load_lora(network: ModelMixin, path: Path, *, trainable: bool = False, dropout: float = 0.0) -> None:
    """Freeze `network` and give it the adapters in `path`, a file or a folder with one; `trainable` lets those learn.

    Reads PEFT's format and that of the diffusers scripts before 0.30 (keys like "….processor.to_q_lora.down.weight").
    Nothing is unpickled or fetched. Raises ModelError for a file that cannot be read, and for adapters whose names or
    shapes are not those of `network`.
    """
    adapters = _read(path)
    _check_fit(network, adapters)
    # What is drawn here is replaced at once.
    _inject(network, adapters.rank, adapters.alpha, dropout, tuple(adapters.pairs), seed=0)
    for layer, pair in adapters.pairs.items():
        for half, tensor in zip("AB", pair, strict=True):
            network.get_submodule(f"{layer}.lora_{half}.{_ADAPTER}").weight.data.copy_(tensor)
    if not trainable:
        network.requires_grad_(False)


def fuse_lora(network: ModelMixin) -> None:
    """Add the adapters of `network` to its weights and take them away: an ordinary network again, still frozen."""
    network.fuse_lora()
    network.unload_lora()


def adapted_network(path: Path) -> Literal["prior", "unet"]:
    """Which network of Kandinsky 2.2 the adapters in `path`, a file or a folder with one, are for.

    Raises ModelError for a file that cannot be read, and for adapters whose layers are in neither network or in both.
    """
    adapters = _read(path)
    parts = {layer.split(".")[0] for layer in adapters.pairs}
    in_prior, in_unet = bool(parts & _PRIOR_PARTS), bool(parts & _UNET_PARTS)
    if in_prior == in_unet:
        raise ModelError(
            f"{adapters.file} adapts layers in {', '.join(sorted(parts))}; expected some in transformer_blocks, of "
            "Kandinsky 2.2's prior, or in down_blocks, mid_block and up_blocks, of its decoder; give a LoRA of one"
        )
    return "prior" if in_prior else "unet"


def _targets(network: ModelMixin, adapted: Set[str]) -> list[str]:
    """The layers `adapted` as PEFT is told of them: by the ends of their names, where no other layer ends so."""
    layers = {name.removesuffix(".base_layer") for name in _linear_layers(network) if ".lora_" not in name}
    ends = {_end(layer) for layer in adapted}
    return sorted(ends if {layer for layer in layers if _end(layer) in ends} == adapted else adapted)


def _end(layer: str) -> str:
    """The last part of a layer's name, with the numbers that follow it."""
    return str(re.findall(r"[^.]+(?:\.\d+)*$", layer)[0])


def _linear_layers(network: ModelMixin) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]


def _inject(network: ModelMixin, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int) -> None:
    """Freeze `network` and put adapters that learn on `targets`, the random generators left as they were."""
    network.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    with torch.random.fork_rng(devices=[]):
        # PEFT draws on the CPU; torch.manual_seed would set the generators of all other devices too.
        torch.default_generator.manual_seed(seed)
        network.add_adapter(config, _ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    network.train(network.training)


def _read(path: Path) -> _Adapters:
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
    wrong = sorted(tensors.keys() ^ {f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"})
    if wrong or not layers:
        raise ModelError(
            f"{file} holds no LoRA: found {len(tensors)} tensors, {len(wrong)} of them of other names or without their "
            f"other half{f', such as {wrong[0]}' if wrong else ''}; expected pairs such as "
            "transformer_blocks.0.attn1.to_q.lora_A.weight and ….lora_B.weight; save it with save_lora_adapter"
        )
    pairs = {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}
    first, _ = pairs[layers[0]]
    rank = len(first) if first.ndim else 0
    return _Adapters(file=file, pairs=pairs, rank=rank, alpha=_alpha(file, metadata, rank))


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


def _alpha(file: Path, metadata: Mapping[str, str], rank: int) -> float:
    """The alpha that the metadata of `file` state; without metadata it is the rank, as in the older scripts."""
    if _METADATA_KEY not in metadata:
        return rank
    # Of PEFT's settings only alpha is followed: it would take orders from the others, such as a module to import.
    try:
        settings = json.loads(metadata[_METADATA_KEY])
        alpha = float(settings["lora_alpha"])
        odd = [name for name in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora") if settings.get(name)]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(
            f"the metadata of {file} cannot be read ({error!r}); expected PEFT's settings with a lora_alpha; save it "
            "again with save_lora_adapter"
        ) from error
    if odd or not math.isfinite(alpha):
        raise ModelError(
            f"{file} was made with {', '.join(odd) or f'lora_alpha {alpha}'}; expected plain LoRA, all adapters of one "
            "rank and one finite alpha; fuse it into its network by the tool that made it"
        )
    return alpha


def _check_fit(network: ModelMixin, adapters: _Adapters) -> None:
    linear = set(_linear_layers(network))
    name, rank = type(network).__name__, adapters.rank
    foreign = sorted(adapters.pairs.keys() - linear)
    if foreign:
        raise ModelError(
            f"{adapters.file} does not fit {name}: found adapters of {len(foreign)} layers that it does not have, such "
            f"as {foreign[0]}; expected linear layers such as {min(linear)}; give a LoRA trained on this network"
        )
    for layer, (a, b) in adapters.pairs.items():
        outputs, inputs = network.get_submodule(layer).weight.shape
        found, expected = (tuple(a.shape), tuple(b.shape)), ((rank, inputs), (outputs, rank))
        if found != expected or rank == 0:
            raise ModelError(
                f"{adapters.file} does not fit {name}: found lora_A and lora_B of {layer} with shapes {found}; "
                f"expected {expected}, all adapters being of one rank; give a LoRA trained on this network"
            )
