"""Caches of the first schema, in which shards have a number and no digest, as the last kcache to write it left them.

`tests/data/schema-1.tar.xz` holds one of each form: the first three pictures of `copy_pictures`, float16, two rows a
shard. What is read, kept or copied of it is the same bit for bit; what is encoded anew is so but for its last bits,
which depend on the processor.
"""

import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from in_bucket import put
from short_runs import config, course
from small_builds import build, copy_pictures, digests, encoded

from kcache import Cache
from kcache.disk.durable import json_bytes
from kcache.errors import CacheMismatchError
from kcache.places import Place, place_of
from kcache.places.effects import publish
from kcache.store.manifest import MANIFEST, read_manifest
from kcache.store.recipe import json_digest
from kcache.training.trainer import train
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.repair import repair_cache
from kcache.upkeep.verify import verify_cache

ARCHIVE = Path(__file__).parents[1] / "data" / "schema-1.tar.xz"
OTHER = {"zarr": "webdataset", "webdataset": "zarr"}
FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_pictures(oracle, tmp_path_factory.mktemp("schema") / "pictures", 3)


@pytest.fixture
def old(form: str, oracle: Path, tmp_path: Path) -> Path:
    """The cache of that form, made with the models of this session, whose paths its manifest shows."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    manifest = json.loads((tmp_path / form / MANIFEST).read_bytes())
    manifest.pop("digest")
    for role, model in manifest["models"].items():
        model["name"] = str(oracle / role)
    (tmp_path / form / MANIFEST).write_bytes(json_bytes(manifest | {"digest": json_digest(manifest)}))
    return tmp_path / form


def rows(cache: Path, samples: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    opened = Cache.open(cache)
    return opened.read(range(len(opened)) if samples is None else samples, FIELDS)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


def assert_encoded_alike(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Two last bits of float16 apart at most, and near zero what sums of float32 are."""
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=2**-9, atol=1e-5, err_msg=name)


def assert_sound(cache: Path, version: int, rows_of: Path | None = None) -> None:
    assert json.loads((cache / MANIFEST).read_bytes())["schema_version"] == version
    result = verify_cache(cache)
    assert (result.corrupt, result.orphaned) == (False, ())
    if rows_of is not None:
        assert_same(rows(cache), rows(rows_of))


def test_it_holds_what_is_encoded_now(old: Path, source: Path, oracle: Path, tmp_path: Path) -> None:
    assert_sound(old, 1)
    build(source, tmp_path / "new", oracle, dtype="float16")
    assert_sound(tmp_path / "new", 2)
    assert_encoded_alike(rows(tmp_path / "new"), rows(old))
    assert Cache.open(old).fingerprint == Cache.open(tmp_path / "new").fingerprint


def test_it_is_trained_from(old: Path, tmp_path: Path) -> None:
    train(str(old), config(tmp_path / "run", max_train_steps=1))
    assert len(course(tmp_path / "run")) == 1


def test_a_build_with_nothing_to_do_leaves_its_bytes(old: Path, source: Path, oracle: Path) -> None:
    build(source, old, oracle, dtype="float16")  # the card shows the models, too
    before = digests(old)
    assert encoded(build(source, old, oracle, dtype="float16")) == {}
    assert digests(old) == before
    assert_sound(old, 1)


def test_it_is_built_on_beside_its_shards(old: Path, oracle: Path, tmp_path: Path) -> None:
    source = copy_pictures(oracle, tmp_path / "more", 5)
    before, whole = {path: digest for path, digest in digests(old).items() if "/0" in path}, rows(old)
    assert encoded(build(source, old, oracle, dtype="float16")) == {"image_embeds": 2, "text": 2, "latents-64": 2}
    after = digests(old)
    assert {path: after.get(path) for path in before} == before
    shards = [shard for entry in read_manifest(old).tables.values() for shard in entry.shards]
    assert {"-" in shard.data.partition("/")[2] for shard in shards} == {False, True}
    build(source, tmp_path / "new", oracle, dtype="float16")
    assert_sound(old, 2)
    assert_same(rows(old, range(3)), whole)
    assert_same(rows(old, [3, 4]), rows(tmp_path / "new", [3, 4]))


def test_its_damage_is_repaired(old: Path, source: Path) -> None:
    whole, kept = rows(old), rows(old, [0])  # whose shards stay as they are
    [file] = old.glob("text-*/00001/text_embeds/c/0/0") if old.name == "zarr" else old.glob("samples-*/00001.tar")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 4])
    assert verify_cache(old).corrupt
    assert sum(repair_cache(str(source), old, device="cpu").encoded.values()) > 0
    assert_sound(old, 2)
    assert_same(rows(old, [0]), kept)
    assert_encoded_alike(rows(old), whole)


def test_it_is_converted_and_merged_and_cleared_up(old: Path, form: str, oracle: Path, tmp_path: Path) -> None:
    convert_cache(old, tmp_path / "converted", OTHER[form])
    assert_sound(tmp_path / "converted", 2, old)
    source = copy_pictures(oracle, tmp_path / "more", 5)
    for number in range(3):
        (source / f"img_{number:02d}.png").unlink()
    build(source, tmp_path / "more-cache", oracle, dtype="float16")
    merge_caches(tmp_path / "merged", [old, tmp_path / "more-cache"])
    assert_sound(tmp_path / "merged", 2)
    assert len(Cache.open(tmp_path / "merged")) == 5
    [table] = (tmp_path / "merged").glob("text-*" if form == "zarr" else "samples-*/")
    (table / "00099.rows.npy").write_bytes(b"never committed, of the first schema")
    shutil.copyfile(table / "00099.rows.npy", table / f"00000-{'0' * 16}.rows.npy")
    assert len(verify_cache(tmp_path / "merged").orphaned) == 2
    assert len(collect_garbage(tmp_path / "merged").paths) == 2
    assert_sound(tmp_path / "merged", 2)
    assert collect_garbage(old).paths == ()
    assert_sound(old, 1)


def test_it_is_the_same_in_a_bucket(old: Path, bucket: str) -> None:
    put(old, f"{bucket}/cache")
    assert verify_cache(f"{bucket}/cache").files == ()
    found = Cache.open(place_of(f"{bucket}/cache")).read(range(3), FIELDS)
    assert_same(found, rows(old))


def test_two_merges_of_such_into_one_bucket_do_not_write_over_each_other(
    old: Path, source: Path, oracle: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is of a cache with another first shard, and is done when the other one puts its own there."""
    fewer = shutil.copytree(old, tmp_path / "fewer")
    (tmp_path / "last").mkdir()
    for path in source.glob("img_02.*"):
        shutil.copyfile(path, tmp_path / "last" / path.name)
    build(tmp_path / "last", fewer, oracle, dtype="float16", replace=True)
    new = f"{bucket}/merged"

    def put_late(made: Path, final: Place) -> None:
        if "/latents-" in str(final) or "/samples-" in str(final):
            monkeypatch.setattr("kcache.upkeep.merge.publish", publish)
            merge_caches(new, [fewer])
        publish(made, final)

    monkeypatch.setattr("kcache.upkeep.merge.publish", put_late)
    with pytest.raises(CacheMismatchError, match="is a shard of another merge"):
        merge_caches(new, [old])
    assert not verify_cache(new).corrupt
    assert len(Cache.open(place_of(new))) == 1
