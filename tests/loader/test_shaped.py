"""Batches of a cache of several shapes: one shape each, from wherever the rows wait."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shaped_caches import ALL, BUCKETS, OTHERS, write_shaped_cache

from kcache.errors import CacheMismatchError, ConfigError
from kcache.loader import CacheLoader
from kcache.loader.chance import draw_flip
from kcache.loader.state import changed_shapes
from kcache.loader.streaming.streamed import StreamShape
from kcache.store.cache import Cache

FIELDS = ["image_embeds", "text_embeds", "latents"]
STREAM = StreamShape(block_rows=2, lanes=2, window_blocks=3)
BATCHES = 60


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shaped") / "cache"
    write_shaped_cache(folder, 30, ALL, flip=True)
    return folder


def begun(path: Path, **wishes: Any) -> CacheLoader:
    """At both resolutions, by samples that have a row at one of them."""
    opened = Cache.open(path, resolution=(32, 64), flip=wishes.pop("flip", None))
    settings = {"seed": 3, "draws": told, "caption_dropout": 0.3, "image_dropout": 0.3}
    return CacheLoader(opened, FIELDS, 4, **(settings | wishes))


def told(turns: np.ndarray, rows: Cache) -> dict[str, np.ndarray]:
    shape = rows.field("latents").shape
    return {"turns": turns, "noise": np.broadcast_to(turns[:, None, None, None], (len(turns), *shape)).copy()}


def taken(loader: CacheLoader) -> list[dict[str, torch.Tensor]]:
    return list(islice(loader.forever(), BATCHES))


@pytest.mark.parametrize("shuffle", ["full", "block", "stream"])
@pytest.mark.parametrize("residency", ["gpu", "mmap", "stream", "copied"])
def test_wherever_rows_wait_batches_are_the_same(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, residency: str, shuffle: str
) -> None:
    if residency == "stream" and shuffle != "stream":
        pytest.skip("is refused")
    order = {"shuffle": shuffle, "shape": STREAM}
    expected = taken(begun(path, residency="ram", **order))
    wishes: dict[str, Any] = {"residency": residency, "stage_bytes": 1 << 24 if residency == "stream" else None}
    if residency == "copied":
        monkeypatch.setattr("kcache.loader.residency._whole", lambda *_: None)
        wishes = {"stage_dir": tmp_path}
    loader = begun(path, **wishes, **order)
    assert loader.residency == ("mmap" if residency == "copied" else residency)
    for found, right in zip(taken(loader), expected, strict=True):
        assert found.keys() == right.keys()
        assert all(torch.equal(found[name], right[name]) for name in right)
        assert found["noise"].shape == found["latents"].shape


def test_what_comes_is_what_the_cache_has_of_the_pictures_and_of_their_mirror_images(path: Path) -> None:
    opened = Cache.open(path, resolution=(32, 64))
    known = {}
    for part in opened.by_shape("latents"):
        for mirrored in (False, True):
            rows = part.read(range(len(part)), ["latents"], mirrored=np.full(len(part), mirrored))["latents"]
            names = part.samples["name"].to_pylist()
            known |= {row.tobytes(): (name, part.shape, mirrored) for row, name in zip(rows, names, strict=True)}
    loader = begun(path)
    epochs, seen = 4, Counter[tuple[str, Any]]()
    for batch in islice(loader.forever(), loader.batches_until(epochs)):
        for row, turn in zip(batch["latents"].numpy(), batch["turns"].numpy(), strict=True):
            name, shape, mirrored = known[row.tobytes()]
            assert mirrored == draw_flip(3, np.array([turn]))[0]
            seen[name, shape] += 1
    assert len(seen) == len({name for name, _, _ in known.values()}) + sum(
        len(part) for part in Cache.open(path, resolution=64, buckets=True).by_shape("latents")
    )
    assert set(seen.values()) <= {epochs - 1, epochs}
    plain = {known[row.tobytes()][2] for batch in taken(begun(path, flip=False)) for row in batch["latents"].numpy()}
    assert plain == {False}


def test_batches_have_about_as_many_pixels(path: Path) -> None:
    """64 × 64 pixels are four times 32 × 32, as are 48 × 80 nearly."""
    sizes = {tuple(each["shape"]): (each["batch"], each["samples"]) for each in begun(path).shapes}
    assert sizes.pop((32, 32))[0] == 4
    assert all(batch == 1 for batch, _ in sizes.values())


def test_a_state_is_of_the_shapes_and_of_mirrored_pictures_or_not(path: Path) -> None:
    state = begun(path).state_dict()
    with pytest.raises(CacheMismatchError, match="flip"):
        begun(path, flip=False).load_state_dict(state)
    single = CacheLoader(Cache.open(path, 32), FIELDS, 4, seed=3)
    with pytest.raises(CacheMismatchError, match="samples of several shapes"):
        single.load_state_dict(state)


def test_what_became_of_the_shapes_is_told(path: Path, tmp_path: Path) -> None:
    """Of the same samples: other shapes, fewer pictures enlarged to them, one shape, no mirror images."""
    state = begun(path).state_dict()

    def told(path: Path, *resolutions: int, **wishes: Any) -> str | None:
        return changed_shapes(state, Cache.open(path, resolutions, **wishes).by_shape("latents"))

    assert told(path, 32, 64) is None
    assert told(path, 32, 64, flip=False) == "mirrored pictures before, none now"
    assert told(path, 32) == "pictures of several shapes before, of one now"
    assert told(path, 64) == "30 pictures of 32x32 before, 0 now"
    write_shaped_cache(tmp_path / "fewer", 30, (ALL[0], replace(BUCKETS, max_upscale=1.1)), flip=True)
    assert told(tmp_path / "fewer", 32, 64) == "9 pictures of 64x64 before, 6 now"
    write_shaped_cache(tmp_path / "others", 30, (ALL[0], OTHERS))
    assert str(told(tmp_path / "others", 32)).endswith("now, mirrored pictures before, none now")
    state = CacheLoader(Cache.open(path, 32), FIELDS, 4).state_dict()
    assert told(path, 32, 64) == "pictures of several shapes now"


def test_all_shapes_share_the_bytes_of_the_stage(path: Path) -> None:
    with pytest.raises(ConfigError, match="the order of each shape"):
        begun(path, residency="stream", shuffle="stream", shape=STREAM, stage_bytes=1 << 10)
