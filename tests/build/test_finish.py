"""Finishing: which samples a cache gets of those that were offered, and where each of their rows stands."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measuring.synthetic import synthetic_recipe
from small_builds import build, copy_pictures

import kcache.build.build
from kcache.build.finish import PictureSizes, whole_samples
from kcache.build.plan import Plan
from kcache.build.survey import acceptable
from kcache.errors import InputRejected
from kcache.store import index
from kcache.store.digests import Keys
from kcache.store.formats import columns
from kcache.store.formats.side_files import size_rows
from kcache.store.index import StoredRows, TableState, index_dtype
from kcache.store.recipe import Field, kind_of
from kcache.store.samples import Refusal, Sample
from kcache.store.shaped.wants import Wants, squares_of
from kcache.store.shards import Rejection

FIELDS = {
    "image_embeds": Field(name="image_embeds", shape=(4,)),
    "latents-64": Field(name="latents", shape=(4, 8, 8)),
    "text": Field(name="text_encoder_hidden_states", shape=(4,), ragged=True),
}
KEYS = st.sampled_from([bytes([i]) * 15 + b"\0" for i in range(6)])
SAMPLES = st.lists(
    st.tuples(KEYS, st.lists(KEYS, max_size=3)).map(
        lambda keys: Sample(
            name="", image_key=keys[0], caption_keys=tuple(keys[1]), captions=tuple(key.hex() for key in keys[1])
        )
    ),
    max_size=12,
).map(lambda samples: [replace(sample, name=f"picture {i}") for i, sample in enumerate(samples)])


@st.composite
def states(draw: st.DrawFn) -> dict[str, TableState]:
    """What is stored of some tables, and what of the rest was rejected; of some keys nothing is known."""
    found = {}
    for name in draw(st.sets(st.sampled_from(sorted(FIELDS)), min_size=1)):
        known = sorted({*draw(st.sets(KEYS)), *filter(None, [kind_of(name).reserved])})
        entries = np.zeros(len(known), index_dtype([FIELDS[name]]))
        entries[FIELDS[name].name]["offset"] = np.arange(len(known))
        rejected = [Rejection(key=key.hex(), stage="decode", reason=f"of {name}") for key in draw(st.sets(KEYS))]
        found[name] = TableState(
            recipe=synthetic_recipe(name, (FIELDS[name],), "float16"),
            stored=StoredRows(entries, Keys.of(known).packed.view("S16").reshape(-1), ()),
            rejections=tuple(rejected),
            provenance={},
        )
    return found


def looked_at_one_by_one(
    samples: list[Sample], tables: dict[str, TableState]
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """The samples that are whole, and of the others name and reason."""

    def why(state: TableState, key: bytes) -> str:
        told = "its content changed while the cache was being built; build again"
        return state.rejected[key].reason if key in state.rejected else told

    whole, refused = [], []
    for sample in samples:
        images = [state for name, state in tables.items() if kind_of(name).per == "image"]
        lacking = [state for state in images if sample.image_key not in state.stored.known]
        if lacking:
            refused.append((sample.name, why(lacking[0], sample.image_key)))
        elif "text" not in tables:
            whole.append(sample)
        else:
            there = [key in tables["text"].stored.known for key in sample.caption_keys]
            refused += [
                (sample.name, why(tables["text"], key))
                for key, is_there in zip(sample.caption_keys, there, strict=True)
                if not is_there
            ]
            if any(there):
                captions, keys = (
                    tuple(each for each, is_there in zip(of, there, strict=True) if is_there)
                    for of in (sample.captions, sample.caption_keys)
                )
                whole.append(replace(sample, captions=captions, caption_keys=keys))  # type: ignore[arg-type]
    return whole, refused


@given(samples=SAMPLES, tables=states())
def test_samples_are_acceptable_in_columns_as_one_by_one(samples: list[Sample], tables: dict[str, TableState]) -> None:
    images = {key for name, state in tables.items() if name != "text" for key in state.rejected}
    captions = set(tables["text"].rejected) if "text" in tables else set[bytes]()
    assert list(acceptable(samples, tables, Wants(()))) == [
        s for s in samples if s.image_key not in images and not (s.caption_keys and captions.issuperset(s.caption_keys))
    ]


@given(samples=SAMPLES, tables=states(), per_table=st.sampled_from([1, 3, 100]))
def test_samples_are_whole_in_columns_as_one_by_one(
    samples: list[Sample], tables: dict[str, TableState], per_table: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "SAMPLES_PER_TABLE", per_table)
        patch.setattr(index, "_TOGETHER", 2)
        wants = Wants(squares_of(tables))
        whole, refused = whole_samples(samples, tables, wants)
        expected, reasons = looked_at_one_by_one(samples, tables)
        assert list(whole) == expected
        assert [(refusal.name, refusal.reason) for refusal in refused] == reasons
        assert all(isinstance(refusal, Refusal) for refusal in refused)
        arrays = index.index_arrays(whole, tables, wants)
    counts = [len(sample.captions) if "text" in tables else 0 for sample in expected]
    assert np.concatenate([*arrays["captions"].runs]).tolist() == [0, *np.cumsum(counts)]
    for name, state in tables.items():
        keys = [key for s in expected for key in (s.caption_keys if name == "text" else (s.image_key,))]
        keys += filter(None, [kind_of(name).reserved])
        found = [entry[FIELDS[name].name]["offset"] for run in arrays[name].runs for entry in run]
        assert found == [sorted(state.stored.known).index(key) for key in keys]
        assert arrays[name].length == len(keys)


def test_a_picture_that_is_gone_before_it_is_measured_costs_itself_and_ends_the_build(
    oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an older kcache, that recorded no sizes, was stopped before it wrote its tars."""
    plan, planned = kcache.build.build.plan_tars, 0

    def counted(*arguments: Any) -> Plan:
        nonlocal planned
        planned += 1
        assert planned < 4
        return plan(*arguments)

    def measured(sizes: PictureSizes, keys: Keys) -> None:
        *there, gone = sorted(keys)
        sizes._sizes.add([size_rows(there, dict.fromkeys(there, (64, 64)))])
        sizes._refused[gone] = InputRejected("source", "it is gone")

    monkeypatch.setattr("kcache.build.build.plan_tars", counted)
    monkeypatch.setattr("kcache.build.pictures.sizes.recorded_sizes", lambda *_: [size_rows((), {})])
    monkeypatch.setattr(PictureSizes, "_measure", measured)
    result = build(copy_pictures(oracle, tmp_path / "pictures"), tmp_path / "cache", oracle, format="webdataset")
    assert (result.samples, result.rejected) == (5, 1)
