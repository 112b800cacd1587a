"""The tiny Kandinsky pair, images and recorded training runs that many tests share."""

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from faulty_s3 import Faults

# How long an example takes says more of what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

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
def s3() -> Iterator[str]:
    """The URL of a bucket of a real object store on this machine; the environment leads there."""
    from s3_server import BUCKET, s3_server

    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture
def bucket(s3: str) -> str:
    """The URL of a place in that bucket where nothing is."""
    return f"{s3}/{secrets.token_hex(6)}"


@pytest.fixture
def faulty(bucket: str, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Faults]":
    """A place in that bucket by way of a proxy; set `faulty.rates` to let it fail. The environment leads there.

    What fails is tried again sooner than else.
    """
    from faulty_s3 import faulty_s3

    from kcache.places.client import _BACKOFF, forget_stores

    monkeypatch.setitem(_BACKOFF, "init_backoff", timedelta(milliseconds=5))
    monkeypatch.setitem(_BACKOFF, "max_backoff", timedelta(milliseconds=50))
    monkeypatch.setattr("kcache.places.conditional._PAUSE_SECONDS", 0.005)
    with faulty_s3(os.environ, bucket) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.endpoint)
        forget_stores()
        yield faults
    forget_stores()


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both forms of a cache: whatever `small_builds` makes in the module's tests is of this form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("small_builds.FORM", request.param)
        yield request.param


@pytest.fixture(autouse=True, scope="module")
def undrawn() -> Iterator[None]:
    """Figures are empty pictures of their size, as to draw them takes most of a short run's time or a report's.

    The curves of a run are not even begun. tests/report/test_figures.py draws.
    """
    from PIL import Image

    from kcache.report.grid import png_bytes
    from kcache.store.run_directory import CURVES_FILE

    def plot_run(run_dir: Path) -> Path:
        Image.new("L", (1, 1)).save(run_dir / CURVES_FILE)
        return run_dir / CURVES_FILE

    def rasterised(figure: Any) -> bytes:
        return png_bytes(Image.new("1", figure.canvas.get_width_height()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kcache.report.figures._rasterised", rasterised)
        for name in sys.modules.keys() & {"kcache.training.result", "kcache.training.validation"}:
            patch.setattr(f"{name}.plot_run", plot_run)
        yield


@pytest.fixture(autouse=True, scope="module")
def loaded_once() -> Iterator[None]:
    """Networks that encode are read from the same files once."""
    with pytest.MonkeyPatch.context() as patch:
        if frozen := sys.modules.get("kcache.encoders.frozen"):
            from loaded_once import once

            patch.setattr(frozen._Frozen, "_load", once(frozen._Frozen._load))
        yield


@pytest.fixture(scope="session")
def build(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Builds a cache of the recorded pictures, with the settings it is given, and returns its path."""
    from kcache.build.build import build_cache
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


@pytest.fixture(scope="session")
def bucketed(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To read from: `source`, and `cache`, built of it, of five shapes, two resolutions and mirror images."""
    from bucketed_builds import bucketed_source, build_bucketed

    folder = tmp_path_factory.mktemp("bucketed")
    build_bucketed(bucketed_source(folder / "source"), folder / "cache", oracle, format="zarr")
    return folder


@pytest.fixture(scope="session")
def controlled(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To read from: `source`, whose pictures have control images; `cache`, built of it, of three shapes and mirror
    images, `squares`, of one shape, and `following`, a decoder that reads hints."""
    from controlled import SHAPED, build_controlled, controlled_source
    from filling import decoder_like, sees_hints

    folder = tmp_path_factory.mktemp("controlled")
    source = controlled_source(folder / "source")
    build_controlled(source, folder / "cache", oracle, **SHAPED, format="zarr")
    build_controlled(source, folder / "squares", oracle, format="zarr")
    decoder_like(folder / "following", oracle, sees_hints)
    return folder


@pytest.fixture
def kcache_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the `kcache` command in this process and returns its exit status."""
    from kcache_cli import app as cli

    monkeypatch.delenv("KCACHE_DEBUG", raising=False)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["kcache", *arguments])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        return int(exited.value.code or 0)

    return run


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Nothing that was compiled before is known, and torch's settings for compiling are as they were."""
    import torch

    settings = torch._dynamo.config
    before = settings.optimize_ddp, settings.recompile_limit
    torch._dynamo.reset()
    yield
    settings.optimize_ddp, settings.recompile_limit = before
    torch._dynamo.reset()


@pytest.fixture
def place(oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where the documents' Hub names and folders are local folders of tiny things."""
    from filling import decoder_like, fills_holes
    from PIL import Image

    from kcache.config import DECODER_REPO, INPAINT_REPO, PRIOR_REPO

    monkeypatch.chdir(tmp_path)
    for name, real in {
        PRIOR_REPO: oracle / "prior",
        "lambdalabs/naruto-blip-captions": oracle / "data",
        "photos": oracle / "data",
        "own": oracle / "data",
        "demo-out/runs/prior": oracle / "prior",
        "demo-out/runs/decoder": oracle / "decoder",
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(real)
    shutil.copytree(oracle / "decoder", DECODER_REPO)
    # As on the Hub: it is how diffusers finds the prior of a decoder.
    Path(DECODER_REPO, "README.md").write_text(f"---\nprior:\n- {PRIOR_REPO}\n---\n")
    decoder_like(Path(INPAINT_REPO), oracle, fills_holes)
    Path(INPAINT_REPO, "README.md").write_text(f"---\nprior:\n- {PRIOR_REPO}\n---\n")
    with Image.open(oracle / "data" / "img_03.png") as picture:
        picture.convert("RGB").save("photo.jpg")
        Image.linear_gradient("L").resize(picture.size).save("hole.png")
    Path("rates.toml").write_text('[[run]]\nname = "low"\n[[run]]\nname = "high"\nlearning_rate = 1e-3\n')
    return tmp_path


@pytest.fixture(scope="session")
def published(cache: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same cache as `cache`, in the webdataset form."""
    from kcache.upkeep.convert import convert_cache

    folder = str(tmp_path_factory.mktemp("published") / "cache")
    convert_cache(cache, folder, "webdataset")
    return folder


@pytest.fixture
def place_with_cache(place: Path, cache: str, published: str) -> Path:
    """A `place` that also has the cache which the documents read, in both forms."""
    for name, real in {"caches/photos-64": cache, "published/photos-64": published}.items():
        shutil.copytree(real, name)
    return place
