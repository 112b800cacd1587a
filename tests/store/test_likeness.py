"""What embeddings say of samples: cosines of captions and pictures, near-duplicates, clusters, and what is kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_bucket import damage, put
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import CacheCorruptError, CacheIncompleteError, ConfigError
from kcache.places import Place
from kcache.store.likeness import cosines, known
from kcache.store.likeness.clusters import far_apart, moved, nearest_middles
from kcache.store.likeness.cosines import caption_cosines, spread_of, unit
from kcache.store.likeness.duplicates import FOUND, Group, find_duplicates, groups_of, nearest_before
from kcache.store.likeness.listing import list_duplicates
from kcache.upkeep.convert import convert_cache

SAMPLES, CAPTIONS = 30, 2
SIZES = ((100, 100), (10, 10), (200, 100))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("likeness") / "cache"
    write_synthetic_cache(
        folder, SAMPLES, dim=8, tables=("image_embeds", "text"), rows_per_shard=7, captions=CAPTIONS, sizes=SIZES
    )
    return folder


@pytest.fixture(params=["zarr", "webdataset", "bucket"])
def place(request: pytest.FixtureRequest, local: Path, tmp_path: Path) -> Place:
    if request.param == "webdataset":
        convert_cache(local, tmp_path / "tars", "webdataset")
        return tmp_path / "tars"
    return local if request.param == "zarr" else put(local, f"memory://likeness/{tmp_path.name}")


def by_torch(cache: Cache) -> np.ndarray:
    """The cosine of the least fitting caption of each sample."""
    pictures = torch.from_numpy(cache.read(range(len(cache)), ["image_embeds"])["image_embeds"]).float()
    found = [
        torch.cosine_similarity(
            torch.from_numpy(cache.read(range(len(cache)), ["text_embeds"], caption)["text_embeds"]).float(), pictures
        )
        for caption in range(CAPTIONS)
    ]
    return torch.stack(found).min(0).values.numpy()


def test_the_caption_that_fits_least_counts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosines, "ROWS_PER_READ", 4)
    cache = Cache.open(place)
    expected = by_torch(cache)
    np.testing.assert_allclose(caption_cosines(cache), expected, atol=1e-6)
    middle = float(np.median(expected))
    fitting = cache.where(f"caption_cosine > {middle} and width >= 100")
    wide = np.array([SIZES[i % 3][0] >= 100 for i in range(SAMPLES)])
    assert fitting.held.selected is not None
    assert fitting.held.selected.tolist() == np.flatnonzero((expected > middle) & wide).tolist()
    # Of a selection, too, in its own order.
    few = cache.select([9, 2, 5])
    kept = [i for i in (9, 2, 5) if expected[i] <= middle]
    assert [few.where(f"caption_cosine <= {middle}").told(n, "name") for n in range(len(kept))] == [
        f"sample {i}" for i in kept
    ]


class Rows:
    """As much of a cache as cosines are computed from."""

    def __init__(self, pictures: np.ndarray, texts: np.ndarray, counts: list[int]) -> None:
        self._rows = {"image_embeds": pictures, "text_embeds": texts}
        self.caption_bounds = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self._rows["image_embeds"])

    def table_of(self, field: str) -> str:
        return field

    def table_rows(self, field: str, first: int, last: int) -> tuple[np.ndarray, None]:
        return self._rows[field][first:last], None


@given(counts=st.lists(st.integers(1, 5), max_size=9), seed=st.integers(0, 99), together=st.integers(1, 4))
def test_any_number_of_captions_in_parts_of_any_size(counts: list[int], seed: int, together: int) -> None:
    rng = np.random.default_rng(seed)
    pictures, texts = (rng.standard_normal((n, 3)).astype(np.float16) for n in (len(counts), sum(counts)))
    cache: Any = Rows(pictures, texts, counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosines, "ROWS_PER_READ", together)
        found = caption_cosines(cache)
    for number, (first, last) in enumerate(zip(cache.caption_bounds[:-1], cache.caption_bounds[1:], strict=True)):
        own = [float(unit(pictures[[number]])[0] @ unit(texts[[i]])[0]) for i in range(first, last)]
        assert found[number] == pytest.approx(min(own), abs=1e-6)


def test_spread() -> None:
    spread = spread_of(np.array([0.1, 0.3], np.float32))
    assert spread is not None
    assert [spread[name] for name in ("min", "mean", "p50", "max")] == pytest.approx([0.1, 0.2, 0.2, 0.3])
    assert spread_of(np.empty(0, np.float32)) is None


def test_what_was_computed_is_kept_until_there_is_another_manifest(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = put(local, f"memory://known/{tmp_path.name}")
    reads, read = [], Cache.table_rows
    monkeypatch.setattr(Cache, "table_rows", lambda *args: reads.append(args[1]) or read(*args))
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    for _ in range(2):
        assert len(Cache.open(far).where("caption_cosine > -2 and duplicate_cosine < 2 and width > 0")) == SAMPLES
        assert set(reads) == {"image_embeds", "text_embeds"}
    count = len(reads)
    Cache.open(far).where("not duplicate")
    Cache.open(far).where("tokens > 0")
    assert len(reads) == count
    # Another cache at the same place.
    few = tmp_path / "few"
    write_synthetic_cache(few, 5, dim=8, tables=("image_embeds", "text"), seed=1)
    put(few, str(far))
    assert len(Cache.open(far).where("caption_cosine > -2 and not duplicate")) == 5
    assert len(reads) > count


def test_what_is_lacking_or_broken_is_one_message(local: Path, tmp_path: Path) -> None:
    write_synthetic_cache(tmp_path / "decoder", 3, dim=8, latent_side=2, tables=("image_embeds", "latents"))
    with pytest.raises(CacheIncompleteError, match=r"holds no 'text_embeds'.*run `kcache cache-build"):
        Cache.open(tmp_path / "decoder").where("caption_cosine > 0")
    for expression in ("duplicate == 1", "duplicate > width", "not duplicate < 1"):
        with pytest.raises(ConfigError, match="say duplicate alone, or not duplicate"):
            Cache.open(local).where(expression)
    far = put(local, f"memory://broken/{tmp_path.name}")
    cache = Cache.open(far)
    file = cache.field_files("image_embeds").files[0].path
    damage(file, 3 * 16 + 5)  # not in the reserved row
    with pytest.raises(CacheCorruptError, match="is corrupt in the row at byte 48"):
        Cache.open(far).where("not duplicate")


def planted(rng: np.random.Generator, count: int, copies: int, noise: float) -> np.ndarray:
    """Rows of length 1 in clusters, and behind them so many of them again, changed a little."""
    middles = rng.standard_normal((20, 64))
    rows = unit(middles[rng.integers(20, size=count)] + rng.standard_normal((count, 64)))
    return np.concatenate([rows, unit(rows[:copies] + noise * rng.standard_normal((copies, 64)) / 8)])


def by_force(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    found = np.zeros(len(rows), FOUND)
    found["sample"], found["cosine"] = np.arange(len(rows)), -1
    for place, number in enumerate(order[1:].tolist(), 1):
        cosines = rows[order[:place]] @ rows[number]
        found[number] = (cosines.max(), order[cosines.argmax()])
    return found


@pytest.mark.parametrize("together", [7, 64, 1000])
def test_the_nearest_one_before_each_in_parts_of_any_size(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(together)
    rows = planted(rng, 150, 30, 0.1)
    order = rng.permutation(len(rows))
    found, expected = nearest_before(rows, order, together=together), by_force(rows, order)
    assert (found["sample"] == expected["sample"]).all()
    np.testing.assert_allclose(found["cosine"], expected["cosine"], atol=1e-6)
    # In cells, whatever their number, none is nearer than the nearest, and near ones are found.
    told = list[tuple[int, int]]()
    near = nearest_before(rows, order, lambda *at: told.append(at), compared=0, together=together)
    assert (near["cosine"] <= expected["cosine"] + 1e-6).all()
    is_near = expected["cosine"] > 0.95
    assert (near["sample"][is_near] == expected["sample"][is_near]).all()
    assert is_near.sum() >= 30
    assert told[-1] == (180, 180)
    # Where each row is compared in every cell, all pairs are.
    monkeypatch.setattr("kcache.store.likeness.duplicates.CELLS_TRIED", 1000)
    everywhere = nearest_before(rows, order, compared=0, together=together)
    assert (everywhere["sample"] == expected["sample"]).all()


def test_one_of_each_group_is_kept_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    rows = planted(rng, 60, 20, 0.05)
    rows[59] = rows[0]  # exactly the same, three in a group
    pairs = {frozenset((0, 60, 59)), *(frozenset((i, 60 + i)) for i in range(1, 20))}
    for order in (np.arange(80), rng.permutation(80), rng.permutation(80)):
        groups = groups_of(nearest_before(rows, order), 0.99)
        assert {frozenset([group.kept, *group.duplicates.tolist()]) for group in groups} == pairs
        rank = np.argsort(order)
        assert all(rank[group.kept] < rank[group.duplicates].min() for group in groups)
        assert len(groups[0].duplicates) == 2
        assert all((group.cosines >= 0.99).all() for group in groups)


def test_a_chain_is_one_group() -> None:
    found = np.array([(-1, 0), (0.96, 0), (0.97, 1), (0.98, 2), (0.5, 0)], FOUND)
    [group] = groups_of(found, 0.95)
    assert (group.kept, group.duplicates.tolist()) == (0, [1, 2, 3])
    assert group.cosines == pytest.approx([0.96, 0.97, 0.98])
    assert groups_of(found, 0.99) == list[Group]()
    assert groups_of(found[:0], 0.5) == []


def test_larger_pictures_are_kept(place: Place) -> None:
    cache = Cache.open(place)
    found = find_duplicates(cache)
    pixels = np.array([np.prod(SIZES[i % 3]) for i in range(SAMPLES)])
    order = np.argsort(-pixels, kind="stable")
    rows = unit(cache.read(range(SAMPLES), ["image_embeds"])["image_embeds"])
    expected = by_force(rows, order)
    assert (found["sample"] == expected["sample"]).all()
    unlike = np.flatnonzero(expected["cosine"] < np.float32(0.6)).tolist()
    assert 3 < len(unlike) < SAMPLES
    few = cache.where("duplicate_cosine < 0.6")
    assert few.samples["name"].to_pylist() == [f"sample {i}" for i in unlike]
    own = known.known_duplicates(few)
    assert (own["sample"] == expected["sample"][unlike]).all()


def test_clusters_are_found() -> None:
    rng = np.random.default_rng(0)
    middles = np.eye(5, 16, dtype=np.float32)
    truth = rng.integers(5, size=200)
    rows = unit(middles[truth] + 0.1 * rng.standard_normal((200, 16)))
    found = moved(rows, far_apart(rows, 5, rng), 10)
    numbers, nearest = nearest_middles(rows, found)
    assert len(set(zip(numbers.tolist(), truth.tolist(), strict=True))) == 5
    np.testing.assert_allclose(nearest, (rows * found[numbers]).sum(1), atol=1e-6)
    # No more than there are different rows, and a middle that no row is near to stays.
    assert len(far_apart(rows[[0, 0, 1]], 3, rng)) == 2
    far = np.concatenate([found, -found[:1]])
    assert (moved(rows, far, 3)[5] == far[5]).all()


def test_the_list_names_groups(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.store.samples.SAMPLES_PER_TABLE", 7)
    cache, output = Cache.open(place), tmp_path / "groups.jsonl"
    output.write_text("of before")
    listed = list_duplicates(str(place), 0.6, str(output))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    groups = groups_of(find_duplicates(cache), 0.6)
    names, ids = (cache.samples[column].to_pylist() for column in ("name", "id"))
    assert [line["kept"] for line in lines] == [{"id": ids[g.kept], "name": names[g.kept]} for g in groups]
    assert [[each["name"] for each in line["duplicates"]] for line in lines] == [
        [names[number] for number in group.duplicates] for group in groups
    ]
    assert (
        listed.duplicates
        == sum(line["samples"] - 1 for line in lines)
        == SAMPLES - len(cache.where("duplicate_cosine < 0.6"))
    )
    assert listed.largest[0]["duplicates"] == lines[0]["duplicates"][:10]
    assert (listed.samples, listed.groups) == (SAMPLES, len(lines))


@pytest.mark.parametrize(
    ("cosine", "output", "message"),
    [
        (0.0, None, "--cosine is 0; expected a number above 0"),
        (float("nan"), None, "--cosine is nan; expected"),
        (1.01, None, "up to 1"),
        (0.9, "", "a folder; expected a file"),
        (0.9, "none/groups.jsonl", "is no folder; expected a file"),
        (0.9, "s3://bucket/groups.jsonl", "s3://"),
    ],
)
def test_a_list_that_cannot_be_is_refused_at_once(
    cosine: float, output: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = str(tmp_path) if output == "" else output
    with pytest.raises(ConfigError, match=message):
        list_duplicates(str(tmp_path / "nowhere"), cosine, where)
