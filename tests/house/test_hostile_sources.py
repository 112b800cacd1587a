"""Forged pictures, tars and metadata: nothing in them is executed, and nothing is read or written outside."""

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from forgery import pickles
from small_builds import build, copy_pictures, digests

from kcache import Cache
from kcache.errors import SourceError
from kcache.sources import open_source


def test_the_payloads_work(tmp_path: Path) -> None:
    for name, content in pickles(tmp_path / "marker").items():
        if name in ("pkl", "pkl.gz"):
            pickle.loads(gzip.decompress(content) if name == "pkl.gz" else content)  # noqa: S301
            (tmp_path / "marker").unlink()
        if name in ("pth", "bin"):
            torch.load(io.BytesIO(content), weights_only=False)
            (tmp_path / "marker").unlink()


def test_the_marker_and_the_outside_are_watched(marker: Path, tmp_path: Path) -> None:
    assert digests(tmp_path / "outside").keys() == {"precious"}
    assert os.listdir(tmp_path / "inside") == []  # noqa: PTH208


def add(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    tar.addfile(info, io.BytesIO(content))


def test_a_hostile_tar_executes_and_writes_nothing(tmp_path: Path, oracle: Path, marker: Path) -> None:
    source = tmp_path / "inside" / "tars"
    source.mkdir()
    picture = next((oracle / "data").glob("img_*.png")).read_bytes()
    with tarfile.open(source / "00000.tar", "w") as tar:
        add(tar, "good.png", picture)
        add(tar, "good.txt", b"a picture")
        for suffix, content in pickles(marker).items():
            add(tar, f"good.x.{suffix}", content)
        for suffix, content in pickles(marker).items():
            add(tar, f"lone-{suffix.replace('.', '-')}.{suffix}", content)
        for name in ("../../outside/x", "/outside/x", f"{tmp_path}/outside/x", "a/../../../outside/x", "~/x"):
            add(tar, f"{name}.png", picture)
            add(tar, f"{name}.txt", b"a picture")
        for name, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("null", tarfile.CHRTYPE)):
            add(tar, f"{name}.png", b"", kind, str(tmp_path / "outside" / "precious"))
            add(tar, f"{name}.txt", b"a picture")
        add(tar, "bomb.png.gz", gzip.compress(bytes(1 << 22)))
        add(tar, "through", b"", tarfile.SYMTYPE, str(tmp_path / "outside"))
        add(tar, "through/x.png", picture)
        add(tar, "through/x.txt", b"a picture")
    result = build(source, tmp_path / "inside" / "cache", oracle)
    cache = Cache.open(tmp_path / "inside" / "cache")
    assert set(cache.samples["name"].to_pylist()) == {"00000.tar/good", "00000.tar/through/x", "00000.tar/~/x"}
    assert result.rejected == len(pickles(marker)) + 9


@pytest.mark.parametrize(
    "spec",
    [
        "pipe:touch {marker}",
        "pipe:touch {marker} && cat {{0..9}}.tar",
        "file:{marker}",
        "http://127.0.0.1:9/{{0..9}}.tar",
    ],
)
def test_commands_and_urls_are_refused(tmp_path: Path, marker: Path, spec: str) -> None:
    with pytest.raises(SourceError, match=r"is a URL|there is no file or folder"):
        open_source(spec.format(marker=marker))


def test_hostile_metadata_reads_nothing_outside(tmp_path: Path, oracle: Path, marker: Path) -> None:
    source = copy_pictures(oracle, tmp_path / "inside" / "pictures", 1)
    names = ["../../outside/precious", str(tmp_path / "outside" / "precious"), "link.png", "door/precious", "."]
    names += ["pipe:touch marker", f"file://{tmp_path}/outside/precious", "img_00.png/../../../outside/precious"]
    (source / "link.png").symlink_to(tmp_path / "outside" / "precious")
    (source / "door").symlink_to(tmp_path / "outside")
    rows = [{"file_name": name, "text": "x"} for name in ["img_00.png", *names]]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_source(str(source))
    assert [opened.name(i) for i in range(len(opened))] == ["img_00.png"]
    assert len([refusal for refusal in opened.refused if "metadata" in refusal.name]) == len(names)
