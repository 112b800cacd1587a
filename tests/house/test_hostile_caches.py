"""Forged arrays, links and foreign files in a cache: nothing is executed, followed or written through."""

import hashlib
import io
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from forgery import MANY, NOT_JSON, pickles, resealed, set_in, use_all
from hypothesis import given
from hypothesis import strategies as st
from small_builds import build

from kcache.disk.durable import read_npy
from kcache.errors import CacheMismatchError, KcacheError
from kcache.store.formats.parts import PARTS, list_parts
from kcache.store.manifest import read_manifest


def test_planted_pickles_in_a_cache_are_never_opened(forged: Path, built: Path, oracle: Path, marker: Path) -> None:
    [table] = forged.glob("image_embeds-*")
    [data] = table.glob("00000-*/")
    for suffix, content in pickles(marker).items():
        for folder in (forged, table, data):
            (folder / f"planted.{suffix}").write_bytes(content)
    (forged / "zarr.py").write_text(f"open({str(marker)!r}, 'w')")
    use_all(forged)
    build(built / "pictures", forged, oracle)


@pytest.mark.parametrize("pattern", ["*/00000-*.rows.npy", "index-*/image_embeds.npy", "index-*/captions.npy"])
@pytest.mark.parametrize("suffix", ["npy", "pkl", "pth"])
def test_pickles_in_place_of_arrays_are_refused(
    forged: Path, built: Path, oracle: Path, marker: Path, pattern: str, suffix: str
) -> None:
    for path in forged.glob(pattern):
        path.write_bytes(pickles(marker)[suffix])
    with pytest.raises(ValueError, match=r"array|Object|magic"):
        read_npy(path)
    with suppress(KcacheError):
        use_all(forged)
    with suppress(KcacheError):
        build(built / "pictures", forged, oracle)


@pytest.mark.parametrize("content", [*NOT_JSON, b'{"shape": [1e99], "codecs": [{"name": "pipe:touch marker"}]}'])
def test_zarr_metadata_is_for_others_and_never_read(forged: Path, content: bytes) -> None:
    for path in forged.rglob("zarr.json"):
        path.write_bytes(content)
    use_all(forged)


def test_links_in_a_cache_are_not_written_through(forged: Path, built: Path, oracle: Path, tmp_path: Path) -> None:
    [table] = forged.glob("latents-64-*")
    shutil.rmtree(table)
    table.symlink_to(tmp_path / "outside")
    with pytest.raises(CacheMismatchError, match="would write elsewhere"):
        build(built / "pictures", forged, oracle)


def test_an_index_that_points_anywhere_is_refused(forged: Path) -> None:
    for name in [*read_manifest(forged).tables, "captions"]:
        [path] = forged.glob(f"index-*/{name}.npy")
        whole = path.read_bytes()
        start = whole.index(b"\n") + 1  # where the header ends
        for fill in (b"\xff", b"\x7f", b"\x01"):
            path.write_bytes(whole[:start] + fill * (len(whole) - start))
            path = reindexed(forged) / path.name
            with pytest.raises(KcacheError):
                use_all(forged)
        path.write_bytes(whole)


def reindexed(forged: Path) -> Path:
    """Make the manifest say that the index arrays are what they are now; returns their folder."""
    folder = next(forged.glob("index-*"))
    listed = list_parts(folder, sorted(path.stem for path in folder.glob("*.npy")))
    (folder / PARTS).write_bytes(listed)
    digest = hashlib.sha256(listed).hexdigest()
    resealed(forged / "manifest.json", set_in("index_digest")(digest))
    return folder.rename(forged / f"index-{digest[:16]}")


@MANY
@given(data=st.data())
def test_no_header_of_an_array_escapes(data: st.DataObject, tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((2, 3), np.uint8))
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 90))] = data.draw(st.integers(0, 255) | st.sampled_from(list(b"'({[,9O-\\")))
    (tmp_path / "x.npy").write_bytes(content)
    for mapped in (False, True):
        with suppress(ValueError, OSError):
            read_npy(tmp_path / "x.npy", mapped=mapped)
