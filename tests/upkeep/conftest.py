"""Caches to convert, made once for all tests of this folder."""

import shutil
from pathlib import Path

import pytest
from small_builds import build, copy_pictures


@pytest.fixture(scope="session")
def pictures(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures: one with two captions, two with the same caption, one image under two names, one that is none."""
    folder = copy_pictures(oracle, tmp_path_factory.mktemp("convert") / "pictures")
    (folder / "img_02.txt").write_text("the first caption\nand a second, longer one")
    (folder / "img_03.txt").write_text("picture number 0")
    shutil.copyfile(folder / "img_04.png", folder / "img_05.png")
    (folder / "img_06.png").write_bytes(b"no picture")
    (folder / "img_06.txt").write_text("a caption whose picture cannot be decoded")
    return folder


@pytest.fixture(scope="session")
def caches(pictures: Path, oracle: Path) -> dict[str, Path]:
    """A cache of the source in each form, built."""
    built = {}
    for form in ("zarr", "webdataset"):
        built[form] = pictures.parent / form
        build(pictures, built[form], oracle, dtype="float16", format=form, rows_per_shard=4)
    return built
