"""The tiny Kandinsky pair, images and recorded training runs that many tests share."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported. Its threads wait for each other by spinning: longer than what tiny networks compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def own_memo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests that the tests remember stay out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KCACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to read from: prior/, decoder/, data/ and *.npz, as tests/data/oracle/README.md says."""
    import torch
    from diffusers import VQModel

    folder = tmp_path_factory.mktemp("oracle", numbered=False)
    shutil.copytree(Path(__file__).parent / "data" / "oracle", folder, dirs_exist_ok=True)
    movq = folder / "decoder" / "movq"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        VQModel.from_config(VQModel.load_config(movq)).save_pretrained(movq)
    return folder


@pytest.fixture(scope="session")
def build(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Builds a cache of the recorded pictures, with the settings it is given, and returns its path."""
    from kcache.build import build_cache
    from kcache.config import BuildConfig

    def build(source: Path | None = None, **settings: Any) -> str:
        cache = str(tmp_path_factory.mktemp("cache") / "cache")
        config = {
            "resolution": (64,),
            "dtype": "float32",
            "batch_size": 4,
            "pretrained_prior_model_name_or_path": str(oracle / "prior"),
            "pretrained_decoder_model_name_or_path": str(oracle / "decoder"),
        }
        build_cache(str(source or oracle / "data"), cache, BuildConfig(**(config | settings)))
        return cache

    return build


@pytest.fixture(scope="session")
def cache(build: Callable[..., str]) -> str:
    """A finished cache of the recorded pictures, float32, all tables."""
    return build()
