"""Pictures come from the stock pipelines, one noise per picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kcache.errors import ModelError
from kcache.sampling import sample


def draw(oracle: Path, prompts: list[str], seed: int = 0) -> list[np.ndarray]:
    pictures: list[Image.Image] = sample(
        prompts,
        decoder=str(oracle / "decoder"),
        prior=str(oracle / "prior"),
        num_inference_steps=2,
        prior_num_inference_steps=2,
        height=64,
        width=128,
        seed=seed,
        device="cpu",
    )
    return [np.asarray(picture) for picture in pictures]


def test_a_picture_depends_on_its_own_prompt_and_noise_only(oracle: Path) -> None:
    together = draw(oracle, ["a red circle", "a blue square"], seed=5)
    alone = draw(oracle, ["a blue square"], seed=6)
    assert together[0].shape == (64, 128, 3)
    assert np.array_equal(together[1], alone[0])
    assert not np.array_equal(together[0], together[1])


def test_a_decoder_is_not_taken_for_a_prior(oracle: Path) -> None:
    with pytest.raises(ModelError, match=r"has no prior/config\.json"):
        sample(["a"], decoder=str(oracle / "decoder"), prior=str(oracle / "decoder"), device="cpu")
