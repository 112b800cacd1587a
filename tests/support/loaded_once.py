"""Frozen networks are read from their files once: reading takes longer than what a test does with tiny ones."""

from collections.abc import Callable
from typing import Any

from torch import dtype, nn

from kcache.encoders import frozen

MOST = 16
"""Networks that are held, the latest ones."""

_held: dict[tuple[Any, ...], nn.Module] = {}


def once(load: Callable[[Any, dtype], nn.Module]) -> Callable[[Any, dtype], nn.Module]:
    """`_Frozen._load` that gives the network that it gave before of the same files; nobody writes into one.

    A test that puts another `load_pretrained` in the place of the real one has that asked.
    """

    def loaded(network: Any, kind: dtype) -> nn.Module:
        files = sorted(network._folder.rglob("*"))
        as_they_are = [(str(file), (of := file.stat()).st_ino, of.st_size, of.st_mtime_ns) for file in files]
        key = (frozen.load_pretrained, network._class, kind, network.device, *as_they_are)
        found = _held.pop(key) if key in _held else load(network, kind)
        _held[key] = found
        if len(_held) > MOST:
            del _held[next(iter(_held))]
        return found

    return loaded
