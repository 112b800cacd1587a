"""torchao's AdamW, whose state is in codes of 4 bits with a scale for each block."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torchao.optim import AdamW4bit
from torchao.optim.subclass_4bit import OptimState4bit


class SteppedAdamW4bit(AdamW4bit):
    """torchao's, which computes step by step unless its kernels are to be `compiled`, and whose rate is a number."""

    def __init__(self, parameters: Iterable[torch.Tensor], *, compiled: bool, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._stance = "default" if compiled else "force_eager"
        for group in self.param_groups:
            group["lr"] = settings["lr"]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move all parameters that have a gradient."""
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.tensor(rate, dtype=torch.float32)
            with torch.compiler.set_stance(self._stance):
                return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


def low_bit_state(entry: str, parts: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> OptimState4bit:
    """The state called `entry` of `parameter` from its `parts`: `codes`, `scale` and `qmap`."""
    signed = entry == "exp_avg"  # squares are not
    return OptimState4bit(parts["codes"], parts["scale"], parts["qmap"], signed, parameter.shape, dtype=torch.float32)
