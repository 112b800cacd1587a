"""All that samples train with beside their rows: one function for training and for validation."""

from collections.abc import Sequence

import numpy as np

from kcache.loader.chance import draw_noise, draw_own_mask, draw_timesteps
from kcache.loader.masks import draw_masks


def draw_turns(
    seed: int,
    turns: np.ndarray,
    shape: tuple[int, ...],
    num_train_timesteps: int,
    draws: int = 1,
    *,
    drawn: Sequence[str] = ("noise", "timesteps"),
    growth: bool = True,
    own_share: float = 0.0,
) -> dict[str, np.ndarray]:
    """What is `drawn` for the samples at `turns` (B,) int64: "noise" of `shape`, "timesteps", a "mask" of its sides.

    `growth` is of the masks, see `draw_masks`; "own_mask" says, for a share `own_share` of them, that a mask of the
    sample's own takes its place.
    """
    arrays = {
        "noise": draw_noise(seed, turns, shape, draws),
        "timesteps": draw_timesteps(seed, turns, num_train_timesteps, draws),
    }
    if "mask" in drawn:
        arrays["mask"] = draw_masks(seed, turns, *shape[-2:], growth=growth)
    if "own_mask" in drawn:
        arrays["own_mask"] = draw_own_mask(seed, turns, own_share)
    return arrays
