"""Held-out images: the same ones in every run, whatever else is in the cache."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import ConfigError
from kcache.heldout import key_numbers, split_by_key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heldout")


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    write_synthetic_cache(folder / "cache", 400, dim=4, latent_side=2, tables=("image_embeds", "latents"))
    return Cache.open(folder / "cache")


def names(cache: Cache) -> set[str]:
    return set(cache.samples["name"].to_pylist())


def test_every_sample_is_on_one_side(cache: Cache) -> None:
    train, held_out = split_by_key(cache, 0.25)
    assert names(train) | names(held_out) == names(cache)
    assert len(train) + len(held_out) == len(cache)
    assert 0.18 * len(cache) < len(held_out) < 0.32 * len(cache)
    fields = ["image_embeds", "latents"]
    name = held_out.samples["name"][3].as_py()
    found, expected = held_out.read([3], fields), cache.read([cache.samples["name"].to_pylist().index(name)], fields)
    assert all((found[field] == expected[field]).all() for field in fields)


def test_the_rule_is_the_one_that_is_documented(cache: Cache) -> None:
    below = []
    for name, key in zip(cache.samples["name"].to_pylist(), cache.samples["image_key"].to_pylist(), strict=True):
        if int(hashlib.sha256(key).hexdigest()[:16], 16) < 0.1 * 2**64:
            below.append(name)
    assert split_by_key(cache, 0.1)[1].samples["name"].to_pylist() == below


def test_an_image_stays_on_its_side_when_others_come(cache: Cache, folder: Path) -> None:
    write_synthetic_cache(folder / "more", 700, dim=4, latent_side=2, tables=("image_embeds",))
    train, held_out = split_by_key(cache, 0.2)
    more_train, more_held_out = split_by_key(Cache.open(folder / "more"), 0.2)
    assert names(train) < names(more_train)
    assert names(held_out) < names(more_held_out)


def test_a_larger_fraction_holds_out_the_same_and_more(cache: Cache) -> None:
    assert names(split_by_key(cache, 0.1)[1]) < names(split_by_key(cache, 0.2)[1])


def test_the_order_of_samples_and_an_earlier_selection_change_nothing(cache: Cache) -> None:
    numbers = np.arange(len(cache))[::-2]
    held_out = split_by_key(cache.select(numbers), 0.3)[1]
    assert names(held_out) == names(split_by_key(cache, 0.3)[1]) & names(cache.select(numbers))


def test_samples_of_one_image_stay_together(cache: Cache) -> None:
    twice = cache.select([*range(100), *range(100)])
    train, held_out = split_by_key(twice, 0.4)
    assert not names(train) & names(held_out)
    assert len(held_out) == 2 * len(names(held_out))


@pytest.mark.parametrize(("fraction", "amount"), [(0.0, "none"), (1e-9, "none"), (1.0, "all")])
def test_an_empty_side_is_refused(cache: Cache, fraction: float, amount: str) -> None:
    with pytest.raises(ConfigError, match=rf"--val-fraction {fraction} holds out {amount} of the 400 images"):
        split_by_key(cache, fraction)


def test_numbers_are_even(cache: Cache) -> None:
    shares = np.histogram(np.array(key_numbers(cache), np.float64) / 2**64, bins=4, range=(0, 1))[0] / len(cache)
    assert (abs(shares - 0.25) < 0.1).all()
