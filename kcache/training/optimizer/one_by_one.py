"""One parameter moved at a time, by any optimizer that looks at each alone.

So weights may be bfloat16: each is brought to float32, moved, and rounded stochastically, up or down with the
probability that makes the mean right (Zamirai et al. 2020, "Revisiting BFloat16 Training", arXiv 2010.06192). A weight
may move within the backward pass, as soon as it has its gradient, and states may wait on the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kcache.loader.chance import draw_rounding


class OneByOne(torch.optim.Optimizer):
    """The optimizer `made`, of one group, moving its parameters one after the other."""

    def __init__(
        self, made: torch.optim.Optimizer, *, seed: int = 0, fused_backward: bool = False, offloaded: bool = False
    ) -> None:
        # Nothing of torch's own: groups and states are those of `made`.
        self.made = made
        self.defaults = made.defaults
        self.offloaded, self.steps, self.midway = offloaded, 0, False
        self._seed, self._fused = seed, fused_backward
        (group,) = made.param_groups
        self._parameters = list(group["params"])
        self._squares: list[torch.Tensor] = []
        if fused_backward:
            for number, parameter in enumerate(self._parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._at_once, number))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of what was `made`, which makes new ones when it loads a state."""
        return self.made.param_groups

    @property
    def state(self) -> dict[torch.Tensor, Any]:  # type: ignore[override]
        """That of what was `made`."""
        return self.made.state

    def state_dict(self) -> dict[str, Any]:
        """That of what was `made`."""
        return self.made.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """That of what was `made`."""
        self.made.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # it takes none
        """Move all parameters that have a gradient, or those that the backward pass has left."""
        for number, parameter in enumerate(self._parameters):
            self._move(number, parameter)
        self.steps += 1
        self.midway = False

    def take_norm(self) -> torch.Tensor:
        """The norm of the gradients that the backward pass has used up, a float32 scalar; counted from 0 again."""
        norm = torch.linalg.vector_norm(torch.stack(self._squares))
        self._squares.clear()
        return norm

    def _at_once(self, number: int, parameter: torch.Tensor) -> None:
        self.midway = True
        self._squares.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        self._move(number, parameter)
        parameter.grad = None

    @torch.no_grad()
    def _move(self, number: int, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        low = parameter.dtype != torch.float32
        # In the place of the parameter, whose dtype stays: what sums gradients of several processes up holds on to it.
        moved = torch.nn.Parameter(parameter.float(), requires_grad=True) if low else parameter
        moved.grad = gradient.float()
        state = self._on(parameter.device, self.state.pop(parameter, {}))
        (group,) = self.made.param_groups
        try:
            self.state[moved], group["params"] = state, [moved]
            self.made.step()
        finally:
            group["params"] = self._parameters
            self.state[parameter] = self._on(torch.device("cpu"), self.state.pop(moved))
        if low:
            generator = torch.Generator(parameter.device).manual_seed(draw_rounding(self._seed, self.steps, number))
            parameter.copy_(round_stochastically(moved.detach(), generator))

    def _on(self, device: torch.device, state: dict[str, Any]) -> dict[str, Any]:
        """`state` on `device`, where states are offloaded; else as it is."""
        if not self.offloaded:
            return state
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def one_by_one_in(optimizer: torch.optim.Optimizer) -> OneByOne | None:
    """The one that `optimizer` is, or within what accelerate made of it; None where all move together."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, OneByOne) else None


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`values` float32 as bfloat16, each one of its two neighbours there, with `values` as the mean.

    A bfloat16 is the upper half of a float32: what is below 2¹⁶ is carried over as often as it is large.
    """
    bits = torch.randint(1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16)
    return bits.view(torch.float32).bfloat16()
