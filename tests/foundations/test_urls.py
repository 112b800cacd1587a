"""A URL is never made into a folder: it is read or written where that can be, else each command says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kcache import Cache
from kcache.build.build import build_cache
from kcache.config import BuildConfig, TrainConfig
from kcache.errors import KcacheError
from kcache.report.cache import ReportConfig
from kcache.report.write import write_report
from kcache.sources import open_source
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.info import describe_cache
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.repair import repair_cache
from kcache.upkeep.verify import verify_cache
from kcache.urls import remote
from kcache_cli.demo import demo
from kcache_cli.doctor import doctor
from kcache_cli.sample import sample

GIVEN: dict[str, Callable[[str, str], Any]] = {
    "SOURCE": lambda url, cache: open_source(url),
    "CACHE to build": lambda url, cache: build_cache("photos", url, BuildConfig()),
    "CACHE to train from": lambda url, cache: Cache.open(url),
    "CACHE to look at": lambda url, cache: describe_cache(url),
    "CACHE to verify": lambda url, cache: verify_cache(url),
    "CACHE to repair": lambda url, cache: repair_cache("photos", url),
    "CACHE to clear up": lambda url, cache: collect_garbage(url),
    "CACHE to convert": lambda url, cache: convert_cache(url, "new", "zarr"),
    "NEW of convert": lambda url, cache: convert_cache(cache, url, "zarr"),
    "CACHE to merge": lambda url, cache: merge_caches("new", [cache, url]),
    "NEW of merge": lambda url, cache: merge_caches(url, [cache]),
    "RUN": lambda url, cache: TrainConfig(stage="prior", output_dir=url),
    "--cache-dir": lambda url, cache: TrainConfig(stage="prior", output_dir="run", cache_dir=url),
    "RUN_OR_CACHE": lambda url, cache: write_report(ReportConfig(path=url)),
    "--output of a report": lambda url, cache: write_report(ReportConfig(path=cache, output=url)),
    "--output-dir of pictures": lambda url, cache: sample(["a fox"], output_dir=Path(url)),
    "--output of the demo": lambda url, cache: demo(output=Path(url)),
    "--path": lambda url, cache: doctor(path=Path(url)),
}


OF_THIS_MACHINE = {
    "RUN", "--cache-dir", "--output of a report", "--output-dir of pictures", "--output of the demo", "--path",
}  # fmt: skip
"""What takes paths only."""
WRITTEN = {"CACHE to build", "CACHE to repair", "CACHE to clear up", "NEW of convert", "NEW of merge"}


def refused(given: str, url: str, cache: str, said: str) -> None:
    with pytest.raises(KcacheError, match=said) as raised:
        GIVEN[given](url, cache)
    assert "\n" not in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("given", GIVEN)
def test_every_path_may_be_a_url_and_none_is_made_into_a_folder(
    given: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url, said in [
        ("oss://bucket/it", "'oss://bucket/it' is a URL of an object store, which is not supported; .*ossutil sync"),
        ("s3a://bucket/it", "'s3a://bucket/it' .*; give 's3://bucket/it'"),
        ("s3://", "'s3://' names no bucket; expected s3://bucket/path|'s3:' is neither a URL"),
        ("s3:bucket/it", "'s3:bucket/it' is neither a URL nor a path that is here; a URL begins with s3://"),
        ("s3://bucket/../it", r"'s3://bucket/\.\./it' has \. or \.\. in it"),
        ("gs://me:hunter2@bucket/it", "with a name or password in it, not repeated here, is not taken"),
        ("https://me:hunter2@host/it", "with a name or password in it, not repeated here, is not taken"),
        ("https://host/it?Signature=hunter2", "'https://host/it' is a URL of the web; download"),
        ("s3://bucket/it?X-Amz-Signature=hunter2", "with parameters behind a [?], not repeated here, is not taken"),
        ("s3://bucket/it ", "'s3://bucket/it ' ends with a blank; give it without"),
        (" s3://bucket/it", "a URL s3://… with a blank before it is not taken; give it without"),
        ("me@host:it", "'me@host:it' is a place on another machine; .*rsync"),
    ]:
        refused(given, url, cache, said)
    if given in OF_THIS_MACHINE:
        refused(
            given, "s3://bucket/it", cache, "'s3://bucket/it' is in an object store; expected a path of this machine"
        )
        refused(given, "file:///it", cache, "'file:///it' is a URL; expected a path; give '/it'")
    if given in OF_THIS_MACHINE | WRITTEN:
        refused(given, "hf://datasets/a/b", cache, "'hf://datasets/a/b' is a URL of the .* Hub, which is only read")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", sorted(GIVEN.keys() - OF_THIS_MACHINE - WRITTEN))
def test_where_nothing_is_at_a_url_that_is_said(given: str, cache: str) -> None:
    for url in ("memory://nothing/it", "memory:/nothing/it/", "file:///nothing/it"):
        refused(given, url, cache, "memory://nothing/it|/nothing/it")


def test_a_file_url_is_the_path(cache: str) -> None:
    assert len(Cache.open(f"file://{cache}")) == len(Cache.open(f"file://localhost{cache}")) == len(Cache.open(cache))
    assert describe_cache(f"file:{cache}")["orphaned_bytes"] == 0


def test_a_url_beside_a_folder_of_its_name_is_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    with pytest.raises(KcacheError, match=r"is a URL, and a path in the folder 's3:' that is here; .*rename"):
        Cache.open("s3://bucket/cache")
    assert not list(Path("s3:").iterdir())


def test_what_is_here_is_a_path_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s3:", "me@host:photos", "C:\\photos", "a:b", "-x", "http:"):
        Path(name).mkdir()
        assert remote(name) is remote(f"{name}/new") is remote(Path(f"{name}/a/new")) is None
    for name in ("C:\\caches", "a:b", "runs/prior", "/gs://x", "", "x" * 5000, "nul\0"):
        assert remote(name) is None
