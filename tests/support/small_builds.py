"""Small builds on the tiny Kandinsky pair, shared by the tests that need a real cache."""

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kcache.build.build import BuildResult, build_cache
from kcache.config import BuildConfig

if TYPE_CHECKING:
    from kcache.build.estimate import BuildEstimate

FORM = "zarr"
"""Form of the caches that are built: a fixture may set it, so that the same tests check both."""


def small_config(oracle: Path, **changes: Any) -> BuildConfig:
    """Settings for the tiny pair: 64 pixels, float32 rows, batches of 4, two decode threads."""
    settings: dict[str, Any] = {
        "resolution": (64,),
        "dtype": "float32",
        "batch_size": 4,
        "num_workers": 2,
        "device": "cpu",
        "format": FORM,
        "pretrained_prior_model_name_or_path": str(oracle / "prior"),
        "pretrained_decoder_model_name_or_path": str(oracle / "decoder"),
    }
    return BuildConfig(**(settings | changes))


def build(source: Path, cache: Path, oracle: Path, **changes: Any) -> BuildResult:
    """Build a small cache of `source`."""
    return build_cache(str(source), str(cache), small_config(oracle, **changes))


def foretold(source: Path, cache: Path, oracle: Path, **changes: Any) -> "BuildEstimate":
    """What a build would do, the encoders not run to know how long it takes."""
    from kcache.build.estimate import estimate_build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kcache.build.estimate._probe", lambda *_: (0.0, 0.0))
        return estimate_build(str(source), str(cache), small_config(oracle, **changes))


def missing(estimate: "BuildEstimate") -> dict[str, int]:
    """Rows that a build would encode, tables without any left out."""
    return {name: table.missing for name, table in estimate.tables.items() if table.missing}


def encoded(result: BuildResult) -> dict[str, int]:
    """Rows that a build encoded, tables without any left out."""
    return {name: table.encoded for name, table in result.tables.items() if table.encoded}


def copy_pictures(oracle: Path, folder: Path, count: int = 6) -> Path:
    """A folder of `count` pictures, img_00.png and so on, with a .txt caption each, free to be changed."""
    folder.mkdir()
    for i, path in enumerate(sorted((oracle / "data").glob("img_*.png"))[:count]):
        shutil.copyfile(path, folder / f"img_{i:02d}.png")
        (folder / f"img_{i:02d}.txt").write_text(f"picture number {i}")
    return folder


def digests(cache: Path) -> dict[str, str]:
    """sha256 of every file of a cache, by relative path."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    return {path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
