"""What learned, written down: adapters as one file, a whole network where a pipeline has it."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from kcache.config import TrainConfig
from kcache.disk.memo import DigestMemo
from kcache.disk.room import Reserve, write_file
from kcache.encoders.repositories import PIPELINES, Repository
from kcache.encoders.weights import weights_digest
from kcache.objectives.lora import save_lora

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls them."""


def find_adapted(config: TrainConfig, base: Repository, known: str | None = None) -> dict[str, str] | None:
    """Name of `base` and digest (hex) of the weights in it that adapters are trained on; None where all weights learn.

    The digest on record is `known`, by which these weights may have been named earlier. Raises ModelError when there
    are no such weights.
    """
    if config.lora_rank is None:
        return None
    with DigestMemo() as memo:
        return {"name": base.name, "weights": weights_digest(base, PIPELINES[config.stage].network, memo, known=known)}


def save_network(stage: str, network: ModelMixin, folder: Path, reserve: Reserve | None = None) -> None:
    """Write what learned into `folder`: adapters as one file for diffusers, a whole network where a pipeline has it.

    Into the room that `reserve` has for these files, if any.
    """
    save = partial(save_tensors, reserve=reserve)
    if getattr(network, "peft_config", None):
        save_lora(network, folder, save)
        return
    folder = folder / PIPELINES[stage].network
    folder.mkdir(parents=True)
    save(network.state_dict(), folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    write_file(folder / CONFIG_NAME, lambda: [network.to_json_string().encode()], reserve)


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    reserve: Reserve | None = None,
) -> None:
    """Write a safetensors file, one tensor after the other; equal tensors give equal bytes. Raises OSError.

    Not by safetensors, which writes into no file that is there already, and for its own user only. The format:
    https://huggingface.co/docs/safetensors/index#format
    """
    # Wide numbers first, so that each lies at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data

    write_file(path, parts, reserve)


def network_bytes(network: ModelMixin) -> int:
    """What a whole network's weights take, in memory and on the disk."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())
