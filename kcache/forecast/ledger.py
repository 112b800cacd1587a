"""Counting memory: what each operation makes and lets go, by kind, and what there was when there was most of it.

Operations run on fake tensors, which have a shape, a dtype and a device, and no data: nothing is computed, and nothing
but the ledger takes memory. Those on real tensors, such as the lengths of captions, run as ever.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

KINDS = ("weights", "gradients", "optimizer", "average", "batch", "activations")
"""What memory is for. Activations are all that has no other name: also what an operation needs for itself."""

HOST = "host"
"""The kind of what lies in the host's memory, and is not counted among a device's."""

Scratch = Callable[[Any, tuple[Any, ...]], int]
"""Bytes that an operation takes for itself, beyond what it gives: of the operation and its arguments."""


def no_scratch(operation: Any, arguments: tuple[Any, ...]) -> int:
    """Of a device whose operations are not known to take anything for themselves."""
    return 0


_UNSEEDED = {torch.ops.aten.randint.generator: torch.ops.aten.randint.default}
"""Operations that draw from a generator, and the same without."""


class Ledger(TorchDispatchMode):
    """In the block, what operations make is counted from when it is made until nothing refers to it."""

    def __init__(self, fake: "FakeTensorMode", scratch: Scratch = no_scratch) -> None:
        super().__init__()
        self._fake = fake
        self._scratch = scratch
        self._known: dict[int, tuple[str, int]] = {}
        self.now: Counter[str] = Counter()
        """Bytes that there are, by kind."""
        self.most: Mapping[str, int] = {}
        """What `now` was when there was most, with what the operation took for itself among the activations."""

    @property
    def peak(self) -> int:
        """The most bytes that there were at a time."""
        return sum(self.most.values())

    def count(self, tensors: Iterable[torch.Tensor | None], kind: str) -> None:
        """Count `tensors` as of this kind, whatever they were counted as before."""
        for tensor in tensors:
            if tensor is not None:
                self._enter(tensor, kind)
        self._look()

    def forget_peak(self) -> None:
        """Look for the most from here on."""
        self.most = {}

    def _enter(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is None:
            weakref.finalize(storage, self._leave, key)
        elif kind is None:
            return
        else:
            self.now[known[0]] -= known[1]
        kind = kind or "activations"
        self._known[key] = kind, size
        self.now[kind] += size

    def _leave(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.now[kind] -= size

    def _look(self, scratch: int = 0) -> None:
        if sum(self.now.values()) - self.now[HOST] + scratch > self.peak:
            self.most = dict(self.now + Counter({"activations": scratch, HOST: -self.now[HOST]}))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, without data where one of its arguments has none, and count what it gives."""
        given = kwargs or {}
        is_fake = any(_has_no_data(leaf) for leaf in tree_leaves((args, given)))
        if given.get("generator") is not None:  # nobody looks at what is drawn
            is_fake, given = True, {name: value for name, value in given.items() if name != "generator"}
            func = _UNSEEDED.get(func, func)
        with self._fake if is_fake else nullcontext():
            made = func(*args, **given)
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._enter(leaf)
        self._look(self._scratch(func, args) if is_fake else 0)
        return made


def _has_no_data(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "fake_mode")
