"""What to type instead: a path that is something else, and a cache that lacks a table."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kcache import Cache
from kcache.errors import CacheIncompleteError, CacheNotFoundError, SourceError
from kcache.hints import instead_of_cache, near_names
from kcache.sources import open_source
from kcache.store.recorded import build_line


@pytest.fixture
def place(oracle: Path, cache: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures, caches in both forms, a pipeline and a run directory."""
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(oracle / "data")
    Path("model").symlink_to(oracle / "prior")
    shutil.copytree(cache, "caches/photos")
    shutil.copytree(published, "caches/tars")
    Path("runs/prior").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.json"):
        Path("runs/prior", name).touch()
    Path("empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("photos", "it is a source of pictures; build a cache of it, and give that: kcache cache-build photos CACHE"),
        ("caches/photo", "there is nothing at that path; did you mean caches/photos?"),
        ("caches", "the caches are in it: caches/photos, caches/tars; give one of them"),
        ("caches/photos/manifest.json", "it is part of the cache caches/photos; give that folder"),
        ("runs/prior", "it is a run directory"),
        ("model", "it is a pipeline of networks"),
        ("rates.toml", "there is nothing at that path; run `kcache cache-build SOURCE rates.toml`"),
        ("empty", "there is no manifest.json in it; run `kcache cache-build SOURCE empty`"),
    ],
)
def test_what_is_no_cache_is_said_with_what_to_type(place: Path, path: str, said: str) -> None:
    with pytest.raises(CacheNotFoundError) as raised:
        Cache.open(path)
    assert f"{path} is not a finished cache: {said}" in str(raised.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("caches/photos", "caches/photos is a cache: its pictures are encoded already"),
        ("caches/tars", "kcache cache-convert caches/tars NEW --format webdataset"),
        ("runs/prior", "runs/prior is a run directory; give the folder, tars or dataset of the pictures"),
        ("photo", "there is no file or folder 'photo'; did you mean photos?"),
        ("nothing-like-it", "there is no file or folder 'nothing-like-it'; expected a folder of images"),
    ],
)
def test_what_is_no_source_is_said_with_what_to_type(place: Path, path: str, said: str) -> None:
    with pytest.raises(SourceError) as raised:
        open_source(path)
    assert said in str(raised.value)


def test_names_that_are_alike_are_found_and_others_not(place: Path) -> None:
    assert near_names(Path("caches/tras")) == str(Path("caches/tars"))
    assert near_names(Path("caches/abc")) == near_names(Path("no/such/folder")) == ""
    assert instead_of_cache(Path("empty")) is None


def test_the_line_adds_what_is_missing_and_encodes_nothing_else(
    oracle: Path, build: Callable[..., str], kcache_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = build(stage="prior", text_padding="trimmed", alpha="black")
    with pytest.raises(CacheIncompleteError) as raised:
        Cache.open(cache).table_of("latents")
    line = shlex.split(str(raised.value).split("`")[1])
    assert line[:4] == ["kcache", "cache-build", "SOURCE", cache]
    # The cache cannot say what it was not built with: the decoder's repository and the resolution.
    assert line[-2:] == ["--resolution", "768"]
    line[-1] = "64"
    decoder = ["--pretrained-decoder-model-name-or-path", str(oracle / "decoder")]
    assert kcache_command("cache-build", str(oracle / "data"), *line[3:], *decoder) == 0
    said = capsys.readouterr().out
    assert "image_embeds: 0 encoded" in said
    assert "text: 0 encoded" in said
    assert "latents-64: 10 encoded" in said


def test_the_line_keeps_the_resolutions_that_there_are(cache: str) -> None:
    line = build_line(Path(cache), Cache.open(cache).manifest, "latents", 512)
    assert line.endswith("--resolution 64 --resolution 512")
    assert "--stage" not in line
    with pytest.raises(CacheIncompleteError, match="--resolution 64 --resolution 512`"):
        Cache.open(cache, resolution=512)
