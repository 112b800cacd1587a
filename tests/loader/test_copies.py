"""Copies of shards: the same batches, each file fetched once, whoever is killed; never more than there is room for."""

import fcntl
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from errno import EIO, ENOSPC
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from in_bucket import damage, put
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import CacheCorruptError, ConfigError
from kcache.loader import CacheLoader, copies
from kcache.places.bucket import BucketPath
from kcache.upkeep.convert import convert_cache

FIELDS = ["latents", "image_embeds", "text_embeds", "text_encoder_hidden_states"]
SAMPLES = 60


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("copies")
    write_synthetic_cache(folder / "zarr", SAMPLES, dim=4, latent_side=2, rows_per_shard=25)
    convert_cache(folder / "zarr", folder / "webdataset", "webdataset", rows_per_shard=25)
    return {form: folder / form for form in ("zarr", "webdataset")}


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits into memory."""
    monkeypatch.setattr("kcache.loader.residency.free_memory", lambda: 0)


@pytest.fixture
def far(caches: dict[str, Path]) -> BucketPath:
    return put(caches["zarr"], f"memory://copies/{secrets.token_hex(6)}")


def loader(cache: Any, **wishes: Any) -> CacheLoader:
    return CacheLoader(Cache.open(cache) if isinstance(cache, (str, Path, BucketPath)) else cache, FIELDS, 8, **wishes)


def some(loaded: CacheLoader) -> list[dict[str, torch.Tensor]]:
    return list(islice(loaded.forever(), 10))


def assert_equal(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".copying")


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_each_file_is_fetched_once_and_read_as_it_is_there(
    caches: dict[str, Path], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, asked, read = put(caches[form], f"memory://copies/{secrets.token_hex(6)}"), list[str](), BucketPath.read_range
    monkeypatch.setattr(BucketPath, "read_range", lambda path, *span: asked.append(path.key) or read(path, *span))
    for _ in range(2):
        copied = loader(far, stage_dir=tmp_path)
        assert copied.residency == "mmap"
        assert_equal(some(copied), some(loader(caches[form], residency="ram")))
        found = files(tmp_path)
        assert {path: path.read_bytes() for path in found} == {
            path: (caches[form] / path.relative_to(tmp_path)).read_bytes() for path in found
        }
    keys = [key for key in asked if "/index-" not in key]
    assert sorted(keys) == sorted(f"{far.key}/{path.relative_to(tmp_path)}" for path in found)


def test_a_selection_needs_the_shards_of_its_samples(far: BucketPath, tmp_path: Path) -> None:
    few = Cache.open(far).select(range(3, 9))
    assert_equal(some(loader(few, stage_dir=tmp_path)), some(loader(few, residency="ram")))
    folders = {path.relative_to(tmp_path).parts[1].partition("-")[0] for path in files(tmp_path)}
    assert folders == {"00000"}


KILLED = """
import os, signal, sys
from pathlib import Path
from kcache import Cache
from kcache.loader import copies

publish, made = copies.publish, []
def publish_three(*given):
    if len(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(publish(*given))

copies.publish, copies._AT_ONCE = publish_three, 1
copies.copied(Cache.open(sys.argv[1]), sys.argv[3:], Path(sys.argv[2]))
"""


def test_whoever_is_killed_loses_only_what_was_under_way(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, caches["zarr"], tmp_path, *FIELDS]).returncode == -9
    made = {path: path.stat().st_ino for path in files(tmp_path) if not path.name.startswith(".tmp-")}
    assert len(made) == 3
    assert len(files(tmp_path)) == 4
    copied = copies.copied(Cache.open(caches["zarr"]), FIELDS, tmp_path)
    assert copied is not None
    assert not list(tmp_path.glob(".tmp-*"))
    assert {path: path.stat().st_ino for path in made} == made
    assert len(files(tmp_path)) > 4


def test_what_has_no_room_is_streamed(
    far: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = sum(file.bytes for file in copies.wanted_files(Cache.open(far), FIELDS))
    streamed = loader(far, stage_dir=tmp_path, stage_bytes=size - 1, shuffle="stream")
    assert streamed.residency == "stream"
    assert f"they have {size:,} bytes, and --stage-bytes is {size - 1:,}" in caplog.text
    monkeypatch.setattr(copies, "free_bytes", lambda folder: size - 1)
    assert_equal(some(loader(far, stage_dir=tmp_path, shuffle="stream")), some(streamed))
    assert f"{size:,} bytes of them are not there yet, and {size - 1:,} bytes are free" in caplog.text
    assert files(tmp_path) == []
    with pytest.raises(ConfigError, match="are to be streamed, but shuffle is 'full'"):
        loader(far, stage_dir=tmp_path)
    monkeypatch.setattr(copies, "free_bytes", lambda folder: size)
    assert loader(far, stage_dir=tmp_path, stage_bytes=size).residency == "mmap"


def test_a_disk_that_is_full_all_of_a_sudden_is_told_of(
    far: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written, made = copies._written, list[Path]()

    def write(source: Any, temporary: Path, *others: Any) -> Any:
        found = written(source, temporary, *others)
        made.append(temporary)
        if len(made) == 5:
            raise OSError(ENOSPC, "No space left on device")
        return found

    monkeypatch.setattr(copies, "_written", write)
    assert loader(far, stage_dir=tmp_path, shuffle="stream").residency == "stream"
    assert "there was no room any more" in caplog.text
    assert not list(tmp_path.glob(".tmp-*"))
    assert loader(far, stage_dir=tmp_path).residency == "mmap"  # later, when there is room again


def test_what_is_not_what_was_committed_is_fetched_again_and_then_refused(
    far: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, read = copies.wanted_files(Cache.open(far), FIELDS)[0], BucketPath.read_range
    times: Iterator[int] = iter(range(10))

    def wrong_once(path: BucketPath, *span: int) -> memoryview:
        content = bytearray(read(path, *span))
        if content and path.key.endswith(wanted.name) and next(times) == 0:
            content[0] ^= 1
        return memoryview(bytes(content))

    monkeypatch.setattr(BucketPath, "read_range", wrong_once)
    assert loader(far, stage_dir=tmp_path / "once").residency == "mmap"
    damage(far / wanted.name, 7)
    with pytest.raises(CacheCorruptError, match=r"differs from what was committed: found .* cache-verify"):
        loader(far, stage_dir=tmp_path / "ever")
    assert not (tmp_path / "ever" / wanted.name).exists()


def test_a_damaged_copy_is_noticed_and_can_be_removed(far: BucketPath, tmp_path: Path) -> None:
    loader(far, stage_dir=tmp_path)
    path = next(path for path in files(tmp_path) if "latents" in path.parts)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheCorruptError, match=r"latents.* is corrupt in the row .* it is a copy: remove it"):
        some(loader(far, stage_dir=tmp_path))
    path.unlink()
    some(loader(far, stage_dir=tmp_path))


def test_one_process_copies_while_others_wait(
    far: BucketPath, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = threading.Event()
    monkeypatch.setattr(copies.time, "sleep", lambda seconds: waited.set() or threading.Event().wait(0.01))
    found: list[str] = []
    descriptor = os.open(tmp_path / ".copying", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    other = threading.Thread(target=lambda: found.append(loader(far, stage_dir=tmp_path).residency))
    other.start()
    assert waited.wait(20)
    assert files(tmp_path) == []
    os.close(descriptor)
    other.join(20)
    assert found == ["mmap"]
    assert "another process copies into" in caplog.text


def test_where_nothing_lacks_nobody_is_waited_for_and_nothing_written(far: BucketPath, tmp_path: Path) -> None:
    loader(far, stage_dir=tmp_path)
    with (tmp_path / ".copying").open() as held:  # by one who copies another cache
        fcntl.flock(held, fcntl.LOCK_EX)
        found: list[str] = []
        other = threading.Thread(target=lambda: found.append(loader(far, stage_dir=tmp_path).residency), daemon=True)
        other.start()
        other.join(20)
        assert found == ["mmap"]


def test_a_folder_inside_of_a_cache_is_refused(caches: dict[str, Path], far: BucketPath, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(caches["zarr"])
    before = sorted(caches["zarr"].rglob("*"))
    for inside in (caches["zarr"], caches["zarr"] / "copies", tmp_path / "link" / "copies"):
        with pytest.raises(ConfigError, match=r"is inside of the cache .* expected a folder beside it"):
            loader(far, stage_dir=inside)
    assert sorted(caches["zarr"].rglob("*")) == before


def test_a_source_that_cannot_be_read_is_not_taken_for_a_disk_that_cannot_be_written(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def readinto(self, target: memoryview) -> int:
            raise OSError(EIO, "Input/output error")

    monkeypatch.setattr(copies, "reading", lambda path: nullcontext(Broken()))
    with pytest.raises(CacheCorruptError, match=rf"^{re.escape(str(caches['zarr']))}/.* cannot be read .*Input/output"):
        loader(caches["zarr"], stage_dir=tmp_path)
    assert files(tmp_path) == []
