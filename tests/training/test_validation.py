"""Held-out images are the same in every run, and nothing but the weights changes their loss."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer, UNet2DConditionModel
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import ConfigError
from kcache.loader.chance import draw_noise, draw_timesteps
from kcache.objectives.blocks import evaluating
from kcache.objectives.losses import DecoderObjective, Objective, PriorObjective
from kcache.training.validation import BANDS, MAX_SAMPLES, Validation, key_numbers, split_by_key

STAGES = ["prior", "decoder"]
BAND_NAMES = ["val_loss_t000_249", "val_loss_t250_499", "val_loss_t500_749", "val_loss_t750_999"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("validation") / "cache"
    write_synthetic_cache(path, 21, dim=32, latent_side=8, captions=2, dtype="float32")
    return Cache.open(path)


@pytest.fixture(scope="module")
def objectives(oracle: Path) -> dict[str, Objective]:
    prior = PriorTransformer.from_pretrained(oracle / "prior", subfolder="prior")
    with torch.no_grad():  # constants that do something: the tiny pair's are 0 and 1
        prior.clip_mean.copy_(torch.linspace(-1, 1, 32))
        prior.clip_std.copy_(torch.linspace(0.5, 2, 32))
    unet = UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(oracle / "decoder", subfolder="scheduler")
    return {"prior": PriorObjective(prior).train(), "decoder": DecoderObjective(unet, scheduler).train()}


def validation(cache: Cache, objective: Objective, batch_size: int = 8, seed: int = 3, **share: int) -> Validation:
    return Validation(cache, objective, batch_size=batch_size, seed=seed, device="cpu", **share)


def measured(cache: Cache, objective: Objective, batch_size: int = 8, seed: int = 3) -> dict[str, float]:
    asked = validation(cache, objective, batch_size, seed)
    return asked.summary(asked.totals())


def of_one_sample(cache: Cache, objective: Objective, sample: int, band: int, seed: int) -> tuple[float, float]:
    """Loss and cosine of a sample alone, computed straight from the definition."""
    turn = np.array([key_numbers(cache)[sample] // 2])
    shape = cache.field(objective.noised_field).shape
    noise = torch.from_numpy(draw_noise(seed, turn, shape))
    timesteps = torch.from_numpy(draw_timesteps(seed, turn, 250) + 250 * band)
    batch = {name: torch.from_numpy(rows) for name, rows in cache.read([sample], list(objective.row_shapes)).items()}
    with torch.no_grad(), evaluating(objective):
        loss = objective.loss(batch, noise, timesteps).item()
        if isinstance(objective, DecoderObjective):
            return loss, 0.0
        prediction = objective.predict(batch, noise, timesteps)[0] * objective.network.clip_std
        predicted, true = (prediction + objective.network.clip_mean)[0].numpy(), batch["image_embeds"][0].numpy()
    return loss, float(predicted @ true / np.linalg.norm(predicted) / np.linalg.norm(true))


@pytest.mark.parametrize("stage", STAGES)
def test_the_means_are_those_of_the_samples_one_by_one(
    cache: Cache, objectives: dict[str, Objective], stage: str
) -> None:
    found = measured(cache, objectives[stage])
    alone = np.array(
        [[of_one_sample(cache, objectives[stage], i, band, 3) for i in range(len(cache))] for band in range(BANDS)]
    )
    assert [found[name] for name in BAND_NAMES] == pytest.approx(alone[..., 0].mean(1), rel=1e-5)
    assert found["val_loss"] == pytest.approx(alone[..., 0].mean(), rel=1e-5)
    if stage == "prior":
        assert found["val_cosine"] == pytest.approx(alone[..., 1].mean(), abs=1e-5)
    assert set(found) == {"val_loss", *BAND_NAMES} | ({"val_cosine"} if stage == "prior" else set())


@pytest.mark.parametrize("stage", STAGES)
def test_no_batch_size_and_no_sharing_out_changes_the_numbers(
    cache: Cache, objectives: dict[str, Objective], stage: str
) -> None:
    expected = measured(cache, objectives[stage])
    assert measured(cache, objectives[stage]) == expected
    assert measured(cache, objectives[stage], batch_size=5) == pytest.approx(expected, rel=1e-5)
    # More processes than fit evenly, and more than there are samples.
    for world_size in (4, 25):
        shares = [
            validation(cache, objectives[stage], rank=rank, world_size=world_size).totals()
            for rank in range(world_size)
        ]
        summary = validation(cache, objectives[stage]).summary(torch.stack(shares).sum(0))
        assert summary == pytest.approx(expected, rel=1e-5)


def test_a_sample_is_measured_alike_in_any_company(cache: Cache, objectives: dict[str, Objective]) -> None:
    objective = objectives["prior"]
    few = [validation(cache.select(part), objective).totals() for part in ([5, 2], [*range(6, 21), 3, 1, 0, 4])]
    assert torch.allclose(sum(few, torch.zeros(4, 3)), validation(cache, objective).totals(), rtol=1e-5)


def test_only_seed_and_weights_move_the_numbers(cache: Cache, objectives: dict[str, Objective]) -> None:
    objective = objectives["prior"]
    before = measured(cache, objective)
    assert measured(cache, objective, seed=4)["val_loss"] != before["val_loss"]
    bias = objective.network.proj_to_clip_embeddings.bias
    with torch.no_grad():
        bias += 0.1
        assert measured(cache, objective)["val_loss"] != before["val_loss"]
        bias -= 0.1


def test_training_goes_on_as_if_nothing_had_been(cache: Cache, objectives: dict[str, Objective]) -> None:
    objective = objectives["prior"]
    objective.network.transformer_blocks[0].eval()
    modes = [module.training for module in objective.modules()]
    state = torch.get_rng_state()
    totals = validation(cache, objective).totals()
    assert not totals.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in objective.modules()] == modes
    objective.train()


def test_dropout_is_off(cache: Cache, objectives: dict[str, Objective], monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objectives["prior"]
    seen: list[bool] = []
    predict: Callable[..., object] = objective.predict
    monkeypatch.setattr(
        objective,
        "predict",
        lambda *a: seen.append(objective.network.training or torch.is_grad_enabled()) or predict(*a),
    )
    measured(cache, objective)
    assert seen == [False] * 12
    assert objective.network.training


def test_at_most_1024_samples_are_looked_at(tmp_path: Path, objectives: dict[str, Objective]) -> None:
    write_synthetic_cache(tmp_path / "cache", MAX_SAMPLES + 40, dim=32, latent_side=1, dtype="float32")
    large = Cache.open(tmp_path / "cache")
    asked = validation(large, objectives["prior"], batch_size=256)
    [part] = asked._parts
    assert len(part.samples) == MAX_SAMPLES
    numbers = np.array(key_numbers(large))
    assert sorted(numbers[part.samples]) == sorted(numbers)[:MAX_SAMPLES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heldout")


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Cache:
    write_synthetic_cache(folder / "cache", 400, dim=4, latent_side=2, tables=("image_embeds", "latents"))
    return Cache.open(folder / "cache")


def names(pictures: Cache) -> set[str]:
    return set(pictures.samples["name"].to_pylist())


def test_every_sample_is_on_one_side(pictures: Cache) -> None:
    train, held_out = split_by_key(pictures, 0.25)
    assert names(train) | names(held_out) == names(pictures)
    assert len(train) + len(held_out) == len(pictures)
    assert 0.18 * len(pictures) < len(held_out) < 0.32 * len(pictures)
    fields = ["image_embeds", "latents"]
    name = held_out.samples["name"][3].as_py()
    found, expected = (
        held_out.read([3], fields),
        pictures.read([pictures.samples["name"].to_pylist().index(name)], fields),
    )
    assert all((found[field] == expected[field]).all() for field in fields)


def test_the_rule_is_the_one_that_is_documented(pictures: Cache) -> None:
    below = []
    for name, key in zip(pictures.samples["name"].to_pylist(), pictures.samples["image_key"].to_pylist(), strict=True):
        if int(hashlib.sha256(key).hexdigest()[:16], 16) < 0.1 * 2**64:
            below.append(name)
    assert split_by_key(pictures, 0.1)[1].samples["name"].to_pylist() == below


def test_an_image_stays_on_its_side_when_others_come(pictures: Cache, folder: Path) -> None:
    write_synthetic_cache(folder / "more", 700, dim=4, latent_side=2, tables=("image_embeds",))
    train, held_out = split_by_key(pictures, 0.2)
    more_train, more_held_out = split_by_key(Cache.open(folder / "more"), 0.2)
    assert names(train) < names(more_train)
    assert names(held_out) < names(more_held_out)


def test_a_larger_fraction_holds_out_the_same_and_more(pictures: Cache) -> None:
    assert names(split_by_key(pictures, 0.1)[1]) < names(split_by_key(pictures, 0.2)[1])


def test_the_order_of_samples_and_an_earlier_selection_change_nothing(pictures: Cache) -> None:
    numbers = np.arange(len(pictures))[::-2]
    held_out = split_by_key(pictures.select(numbers), 0.3)[1]
    assert names(held_out) == names(split_by_key(pictures, 0.3)[1]) & names(pictures.select(numbers))


def test_samples_of_one_image_stay_together(pictures: Cache) -> None:
    twice = pictures.select([*range(100), *range(100)])
    train, held_out = split_by_key(twice, 0.4)
    assert not names(train) & names(held_out)
    assert len(held_out) == 2 * len(names(held_out))


@pytest.mark.parametrize(("fraction", "amount"), [(0.0, "none"), (1e-9, "none"), (1.0, "all")])
def test_an_empty_side_is_refused(pictures: Cache, fraction: float, amount: str) -> None:
    with pytest.raises(ConfigError, match=rf"--val-fraction {fraction} holds out {amount} of the 400 images"):
        split_by_key(pictures, fraction)


def test_numbers_are_even(pictures: Cache) -> None:
    shares = np.histogram(np.array(key_numbers(pictures), np.float64) / 2**64, bins=4, range=(0, 1))[0] / len(pictures)
    assert (abs(shares - 0.25) < 0.1).all()
