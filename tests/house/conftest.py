"""A folder that files are forged in, and what lies around it and must not change."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_builds import build, copy_pictures


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that no test may leave behind, nor anything else outside the folder `inside`."""
    (tmp_path / "inside").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("as it was")
    marker = tmp_path / "marker"
    yield marker
    assert not marker.exists()
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "as it was"


@pytest.fixture(scope="session")
def built(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source of four pictures and its cache."""
    folder = tmp_path_factory.mktemp("built")
    copy_pictures(oracle, folder / "pictures", 4)
    build(folder / "pictures", folder / "cache", oracle)
    return folder


@pytest.fixture
def forged(built: Path, tmp_path: Path, marker: Path) -> Path:
    """A copy of the cache, to change; nothing outside its folder may change."""
    return Path(shutil.copytree(built / "cache", tmp_path / "inside" / "cache"))
