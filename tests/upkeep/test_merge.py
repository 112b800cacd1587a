"""Merging: all samples of several caches in a new one that owns its files, nothing encoded."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_bucket import contents, put
from small_builds import build, copy_pictures, digests, encoded

from kcache import Cache
from kcache.encoders.repositories import find_repository
from kcache.errors import CacheMismatchError, CacheNotFoundError, ConfigError, ModelError
from kcache.places import place_of
from kcache.store.recipe import json_digest
from kcache.store.shards import Commit, write_commit
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.info import describe_cache
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.verify import verify_cache

pytestmark = pytest.mark.usefixtures("form")

FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]


@pytest.fixture(scope="module")
def built(form: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all/, and its parts one/ and two/, which share img_03; each with a broken picture and its cache beside it."""
    folder = tmp_path_factory.mktemp("merge")
    everything = copy_pictures(oracle, folder / "all", 8)
    (everything / "img_02.png").write_bytes(b"no picture")
    (everything / "img_06.png").write_bytes(b"no picture either")
    for name, numbers in (("one", range(4)), ("two", range(3, 8))):
        (folder / name).mkdir()
        for i in numbers:
            for suffix in ("png", "txt"):
                shutil.copyfile(everything / f"img_{i:02d}.{suffix}", folder / name / f"img_{i:02d}.{suffix}")
    for name in ("one", "two", "all"):
        build(folder / name, folder / f"{name}-cache", oracle, rows_per_shard=2)
    return folder


def rows(cache: Path) -> dict[str, np.ndarray]:
    opened = Cache.open(cache)
    return opened.read(range(len(opened)), FIELDS)


def test_the_parts_make_the_whole(built: Path, oracle: Path, tmp_path: Path) -> None:
    manifest = merge_caches(tmp_path / "new", [built / "one-cache", built / "two-cache"])
    new, whole = Cache.open(tmp_path / "new"), Cache.open(built / "all-cache")
    assert (new.fingerprint, new.samples_digest) == (whole.fingerprint, whole.samples_digest)
    assert (manifest.samples, manifest.rejected) == (6, 2)
    expected, found = rows(built / "all-cache"), rows(tmp_path / "new")
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6)
    before = digests(tmp_path / "new")
    assert encoded(build(built / "all", tmp_path / "new", oracle, rows_per_shard=2)) == {}
    assert digests(tmp_path / "new") == before


def test_shards_are_linked_and_the_new_cache_owns_them(built: Path, tmp_path: Path) -> None:
    for name in ("one-cache", "two-cache"):
        shutil.copytree(built / name, tmp_path / name)
    merge_caches(tmp_path / "new", [tmp_path / "one-cache", tmp_path / "two-cache"])
    data = [path for path in tmp_path.glob("new/*-*/0*") if path.suffix in ("", ".tar")]
    files = [file for path in data for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    assert files
    assert all(file.stat().st_nlink == 2 for file in files)
    before = rows(tmp_path / "new")
    for name in ("one-cache", "two-cache"):
        shutil.rmtree(tmp_path / name)
    after = rows(tmp_path / "new")
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_where_there_are_no_hard_links_shards_are_copied(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_caches(tmp_path / "linked", [built / "one-cache", built / "two-cache"])

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    merge_caches(tmp_path / "copied", [built / "one-cache", built / "two-cache"])
    assert digests(tmp_path / "copied") == digests(tmp_path / "linked")


def test_other_captions_of_the_same_image_are_united(built: Path, oracle: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    shutil.copyfile(built / "one" / "img_01.png", tmp_path / "more" / "img_01.png")
    (tmp_path / "more" / "img_01.txt").write_text("a better caption\npicture number 1")
    build(tmp_path / "more", tmp_path / "more-cache", oracle)
    merge_caches(tmp_path / "new", [built / "one-cache", tmp_path / "more-cache"])
    new, one, more = (Cache.open(path) for path in (tmp_path / "new", built / "one-cache", tmp_path / "more-cache"))
    i = one.samples["id"].to_pylist().index(more.samples["id"].to_pylist()[0])
    assert len(new) == len(one)
    assert new.samples["captions"].to_pylist()[i] == ["picture number 1", "a better caption"]
    for caption, (cache, sample, number) in enumerate([(one, i, 0), (more, 0, 0)]):
        expected = cache.read([sample], FIELDS, number)
        found = new.read([i], FIELDS, caption)
        for name in FIELDS:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6)


def test_a_cache_may_count_more_than_others_and_the_first_of_a_sample_decides(built: Path, tmp_path: Path) -> None:
    parts = [built / "one-cache", built / "two-cache"]
    merge_caches(tmp_path / "new", parts, weights=[1, 0.1], repeats=[3, 1])
    new = Cache.open(tmp_path / "new")
    first = set(Cache.open(parts[0]).samples["id"].to_pylist())
    expected = {
        each: (1.0, 3) if each in first else (float(np.float32(0.1)), 1) for each in new.samples["id"].to_pylist()
    }
    assert set(expected.values()) == {(1.0, 3), (float(np.float32(0.1)), 1)}

    def said(cache: Cache) -> dict[str, tuple[float, int]]:
        columns = (cache.samples[name].to_pylist() for name in ("id", "weight", "repeats"))
        return {identity: (weight, repeats) for identity, weight, repeats in zip(*columns, strict=True)}

    assert said(new) == expected
    assert not verify_cache(tmp_path / "new").corrupt
    merge_caches(tmp_path / "again", [tmp_path / "new"], weights=[10.0], repeats=[2])
    again = Cache.open(tmp_path / "again")
    assert said(again) == {identity: (weight * 10, times * 2) for identity, (weight, times) in expected.items()} | {
        identity: (1.0, 2) for identity, (_, times) in expected.items() if times == 1
    }
    about = describe_cache(tmp_path / "again")
    assert (about["turns"], about["repeats"]["max"]) == (sum(times for _, times in said(again).values()), 6)
    assert about["weights"] == pytest.approx({"min": 1.0, "mean": again.counts.weights[:].mean(), "max": 10.0})
    convert_cache(tmp_path / "again", tmp_path / "other", "webdataset" if new.manifest.format == "zarr" else "zarr")
    assert said(Cache.open(tmp_path / "other")) == said(again)
    assert np.array_equal(Cache.open(tmp_path / "other").counts.repeats, again.counts.repeats)
    plain = [
        merge_caches(tmp_path / name, parts, weights=w, repeats=r)
        for name, w, r in (("a", None, None), ("b", [1, 1], [1, 1]))
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"weights": [1.0]}, "1 weights and 2 repeats were given for 2 caches"),
        ({"weights": [1.0, -1.0]}, "weight of a cache is -1.0; expected a number, 0 or more"),
        ({"weights": [float("nan"), 1.0]}, "weight of a cache is nan"),
        ({"weights": [1e39, 1.0]}, "a sample would have weight 1e.39"),
        ({"repeats": [1, 0]}, "repeats of a cache are 0; expected a whole number"),
        ({"repeats": [1, 1.5]}, "repeats of a cache are 1.5"),
        ({"repeats": [1, 1 << 31]}, "repeats of a cache are 2147483648"),
    ],
)
def test_what_a_cache_cannot_count_is_refused(built: Path, tmp_path: Path, numbers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_caches(tmp_path / "new", [built / "one-cache", built / "two-cache"], **numbers)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_merge_is_no_cache_and_is_finished(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [built / "one-cache", built / "two-cache"]
    merge_caches(tmp_path / "whole", parts)
    for _ in range(2):
        left = 1

        def interrupted(*arguments: object) -> Commit:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return write_commit(*arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr("kcache.upkeep.merge.write_commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                merge_caches(tmp_path / "new", parts)
        with pytest.raises(CacheNotFoundError):
            Cache.open(tmp_path / "new")
    merge_caches(tmp_path / "new", parts)
    merge_caches(tmp_path / "new", parts)
    assert digests(tmp_path / "new") == digests(tmp_path / "whole")


def test_caches_of_other_recipes_are_refused_field_by_field(built: Path, oracle: Path, tmp_path: Path) -> None:
    build(built / "two", tmp_path / "other", oracle, dtype="float16", alpha="drop", stage="prior")
    with pytest.raises(CacheMismatchError) as caught:
        merge_caches(tmp_path / "new", [built / "one-cache", tmp_path / "other"])
    message = str(caught.value)
    assert "tables: image_embeds, text → image_embeds, latents-64, text" in message
    assert "image_embeds.preprocess.alpha: drop → white" in message
    assert "text.stored_dtype: float16 → float32" in message
    assert not (tmp_path / "new").exists()


def test_two_names_of_one_tokenizer_are_no_difference(
    built: Path, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = find_repository(str(oracle / "prior"), None, ("tokenizer",))
    names = ("merges.txt", "special_tokens_map.json", "tokenizer.json", "vocab.json", "added_tokens.json")
    paths = [path for name in names if (path := oracle / "prior" / "tokenizer" / name).is_file()]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    of_files = json_digest({"files": files, "config": repository.read("tokenizer").lasting})
    with monkeypatch.context() as patch:  # as tokenizers were named before
        patch.setattr("kcache.encoders.recipes.tokenizer_digest", lambda *_, **__: of_files)
        build(built / "one", tmp_path / "one", oracle, rows_per_shard=2)
    assert Cache.open(tmp_path / "one").recipes["text"].preprocess["tokenizer"] == of_files
    for order in ([tmp_path / "one", built / "two-cache"], [built / "two-cache", tmp_path / "one"]):
        merge_caches(tmp_path / "new", order)
        assert Cache.open(tmp_path / "new").recipes == Cache.open(order[0]).recipes
        assert encoded(build(built / "all", tmp_path / "new", oracle, rows_per_shard=2)) == {}
        assert not verify_cache(tmp_path / "new").corrupt
        shutil.rmtree(tmp_path / "new")
    monkeypatch.setattr("kcache.upkeep.merge.tokenizer_digest", lambda *_, known: known if known == of_files else "")
    with pytest.raises(CacheMismatchError, match=r"differs in text\.preprocess\.tokenizer: \w+… → \w+…; expected"):
        merge_caches(tmp_path / "new", order)
    monkeypatch.setattr("kcache.upkeep.merge.find_repository", absent)
    with pytest.raises(CacheMismatchError, match="two names of the same cannot be seen: it is gone"):
        merge_caches(tmp_path / "new", order)


def absent(*_: object) -> None:
    raise ModelError("it is gone")


def test_other_forms_and_other_targets_are_refused(built: Path, oracle: Path, form: str, tmp_path: Path) -> None:
    build(built / "two", tmp_path / "other", oracle, format="zarr" if form == "webdataset" else "webdataset")
    with pytest.raises(CacheMismatchError, match="format: "):
        merge_caches(tmp_path / "new", [built / "one-cache", tmp_path / "other"])
    before = digests(built / "one-cache")
    with pytest.raises(CacheMismatchError, match="other samples already"):
        merge_caches(built / "one-cache", [built / "one-cache", built / "two-cache"])
    assert digests(built / "one-cache") == before


def test_a_merge_into_a_bucket_is_the_same(built: Path, tmp_path: Path, bucket: str) -> None:
    parts = [built / "one-cache", built / "two-cache"]
    merge_caches(tmp_path / "new", parts)
    merge_caches(f"{bucket}/new", [put(parts[0], f"{bucket}/one"), parts[1]])
    assert contents(place_of(f"{bucket}/new")) == contents(tmp_path / "new")
