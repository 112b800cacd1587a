"""Recipes: equal ones have equal fingerprints, any difference makes another, and is said by its path."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcache.store.recipe import Field, Recipe, canonical_json, recipe_differences

RECIPE = Recipe(
    table="latents-64",
    encoder="VQModel",
    weights="a" * 64,
    config="b" * 64,
    preprocess={"alpha": "white", "resize": {"method": "bicubic", "side": 64}},
    compute_dtype="float32",
    batch_shape=(4, 3, 64, 64),
    stored_dtype="float16",
    fields=(Field(name="latents", shape=(4, 8, 8)),),
)
CHANGES = {
    "table": "latents-32",
    "encoder": "AutoencoderKL",
    "weights": "c" * 64,
    "config": "c" * 64,
    "preprocess": {"alpha": "drop", "resize": {"method": "bicubic", "side": 64}},
    "compute_dtype": "bfloat16",
    "batch_shape": (8, 3, 64, 64),
    "stored_dtype": "float32",
    "fields": (Field(name="latents", shape=(4, 8, 9)),),
    "schema_version": 2,
}


def test_json_brings_back_the_same_recipe() -> None:
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE
    assert Recipe.from_json(RECIPE.to_json()).fingerprint == RECIPE.fingerprint


def test_the_fingerprint_is_pinned() -> None:
    """Caches in the world are found by it: a change must be a decision, with another schema version."""
    assert RECIPE.fingerprint == "322db7970f115e054c3a828be52d78a426beff89b03d187be585cf6631afa416"
    assert RECIPE.directory == "latents-64-322db797"


@pytest.mark.parametrize("name", list(CHANGES))
def test_every_field_counts_and_is_named(name: str) -> None:
    other = replace(RECIPE, **{name: CHANGES[name]})
    assert other.fingerprint != RECIPE.fingerprint
    [line] = recipe_differences(RECIPE, other)
    assert line.startswith(name)
    assert " → " in line


def test_nested_differences_are_named_by_path() -> None:
    other = replace(RECIPE, preprocess={"alpha": "white", "resize": {"method": "bicubic", "side": 32}})
    assert recipe_differences(RECIPE, other) == ["preprocess.resize.side: 64 → 32"]
    assert recipe_differences(RECIPE, RECIPE) == []


def test_digests_are_shortened_for_people() -> None:
    assert recipe_differences(RECIPE, replace(RECIPE, weights="c" * 64)) == ["weights: aaaaaaaaaaaa… → cccccccccccc…"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(value=st.dictionaries(st.text(), JSON))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical_json(value) == canonical_json(backwards)
