"""LoRA: low-rank adapters beside the frozen linear layers of a network, by PEFT, and what learns whole with them.

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685: a layer with input x has
B·A·x · alpha / rank added to its output, with A (rank, inputs) and B (outputs, rank). rsLoRA (Kalajdzievski 2023, arXiv
2312.03732) scales by alpha / √rank; DoRA (Liu et al. 2024, arXiv 2402.09353) learns the length of each row of the sum
beside its direction. Adapters are kept in a file that
diffusers reads by `network.load_lora_adapter(folder, prefix=None, weight_name=WEIGHTS_FILE)`; without `prefix=None` it
finds nothing in it and only warns. Modules that learn whole, as a decoder has that was widened, stand in the same file
under their own names, as PEFT's `modules_to_save` do: diffusers takes them, too, into a network that is as wide.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from kcache.errors import ConfigError, ModelError
from kcache.objectives.lora_file import METADATA_KEY, WEIGHTS_FILE, Adapters, read_adapters
from kcache.objectives.widening import learnt_whole, widen_for_hints, widen_for_masks

_ADAPTER = "default"
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


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
    whole: Sequence[str] = (),
    use_dora: bool = False,
    use_rslora: bool = False,
) -> None:
    """Freeze `network` and give it adapters that learn, float32 whatever its own dtype; its output stays the same.

    The modules called `whole` learn, too, and are kept with the adapters: `learnt_whole` of a decoder that was widened.

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
    scaled = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "use_dora": use_dora, "use_rslora": use_rslora}
    _inject(network, scaled, dropout, targets, seed, whole)


def save_lora(network: ModelMixin, folder: Path, save: Callable[..., None] = save_file) -> None:
    """Write the adapters of `network` to `folder`/pytorch_lora_weights.safetensors, PEFT's settings as metadata.

    With them what learns whole. Equal ones give equal bytes. `save` is what writes tensors, to a path, with metadata.
    """
    settings = network.peft_config[_ADAPTER].to_dict()
    # diffusers builds adapters from these, and nothing would switch their dropout off, not even in a pipeline.
    settings["lora_dropout"] = 0.0
    tensors = get_peft_model_state_dict(network, adapter_name=_ADAPTER)
    if settings["lora_alpha"] == int(settings["lora_alpha"]):
        settings["lora_alpha"] = int(settings["lora_alpha"])
    # Not as they were asked for, which adapters that were loaded do not know any more.
    settings["target_modules"] = _targets(network, {name.partition(".lora_")[0] for name in tensors})
    for module in settings["modules_to_save"] or ():
        tensors |= network.get_submodule(module).state_dict(prefix=f"{module}.")
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)  # PEFT keeps names in sets
    folder.mkdir(parents=True, exist_ok=True)
    # Not by diffusers' save_lora_adapter, which warns of a cast that it does not make.
    save(tensors, folder / WEIGHTS_FILE, {METADATA_KEY: text})


def load_lora(network: ModelMixin, path: Path, *, trainable: bool = False, dropout: float = 0.0) -> None:
    """Freeze `network` and give it the adapters in `path`, a file or a folder with one; `trainable` lets those learn.

    Where they are of a decoder that was widened, `network` is a plain one, and is widened likewise; what they have
    whole gets its dtype unless it learns. Raises ModelError for a file that cannot be read, and for adapters whose
    names or shapes are not those of `network`.
    """
    adapters = read_adapters(path)
    _check_fit(network, adapters)
    own = network.dtype
    whole = _widen(network, adapters)
    # What is drawn here is replaced at once.
    scaled = {"r": adapters.rank, "lora_alpha": adapters.alpha, "use_rslora": adapters.rslora}
    scaled |= {"use_dora": bool(adapters.magnitudes)}
    _inject(network, scaled, dropout, tuple(adapters.pairs), seed=0, whole=whole)
    for name, tensor in adapters.whole.items():
        network.get_parameter(name).data.copy_(tensor)
    for layer, pair in adapters.pairs.items():
        for half, tensor in zip("AB", pair, strict=True):
            network.get_submodule(f"{layer}.lora_{half}.{_ADAPTER}").weight.data.copy_(tensor)
    for layer, magnitude in adapters.magnitudes.items():
        network.get_submodule(f"{layer}.lora_magnitude_vector.{_ADAPTER}").weight.data.copy_(magnitude)
    if not trainable:
        network.requires_grad_(False)
        for module in whole:  # unlike adapters, they take inputs of their own dtype alone
            network.get_submodule(module).to(own)


def fuse_lora(network: ModelMixin) -> None:
    """Add the adapters of `network` to its weights and take them away: an ordinary network again, still frozen."""
    network.fuse_lora()
    network.unload_lora()


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


def _inject(
    network: ModelMixin,
    scaled: Mapping[str, Any],
    dropout: float,
    targets: Sequence[str],
    seed: int,
    whole: Sequence[str],
) -> None:
    """Freeze `network` and put adapters that learn on `targets`, the random generators left as they were.

    `scaled` are PEFT's settings of their rank, and of what they are scaled by. The modules called `whole` learn as they
    are.
    """
    network.requires_grad_(False)
    config = LoraConfig(
        **scaled,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    with torch.random.fork_rng(devices=[]):
        # PEFT draws on the CPU; torch.manual_seed would set the generators of all other devices too.
        torch.default_generator.manual_seed(seed)
        network.add_adapter(config, _ADAPTER)
    # Not before: PEFT would keep another copy of each, under another name, which a fused network would not take.
    config.modules_to_save = list(whole) or None
    for module in whole:
        network.get_submodule(module).requires_grad_(True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    network.train(network.training)


def _widen(network: ModelMixin, adapters: Adapters) -> tuple[str, ...]:
    """Widen `network` as the adapters want it, and say which of its modules they have whole."""
    adapters.applied_to(network.config)
    if not adapters.whole:
        return ()
    (widen_for_hints if "addition_embed_type" in adapters.widening else widen_for_masks)(network)
    whole = learnt_whole(network)
    expected = {
        f"{module}.{name}": tuple(tensor.shape)
        for module in whole
        for name, tensor in network.get_submodule(module).state_dict().items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in adapters.whole.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ModelError(
                f"{adapters.file} does not fit {type(network).__name__}: found {name} with shape {found.get(name)}; "
                f"expected {expected.get(name)}; give a LoRA trained on this network"
            )
    return whole


def _check_fit(network: ModelMixin, adapters: Adapters) -> None:
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
        if layer in adapters.magnitudes and tuple(adapters.magnitudes[layer].shape) != (outputs,):
            raise ModelError(
                f"{adapters.file} does not fit {name}: found the magnitudes of {layer} with shape "
                f"{tuple(adapters.magnitudes[layer].shape)}; expected ({outputs},); give a LoRA trained on this network"
            )
        if found != expected or rank == 0:
            raise ModelError(
                f"{adapters.file} does not fit {name}: found lora_A and lora_B of {layer} with shapes {found}; "
                f"expected {expected}, all adapters being of one rank; give a LoRA trained on this network"
            )
