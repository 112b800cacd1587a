"""A URL is never made into a folder: each command says what it is, and what to do."""

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


@pytest.mark.parametrize("given", GIVEN)
def test_every_path_may_be_a_url_and_none_is_made_into_a_folder(
    given: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url, said in [
        ("s3://bucket/it", "'s3://bucket/it' is a URL of an object store, which is not supported; .*aws s3 sync"),
        ("gs://bucket/it", "'gs://bucket/it' is a URL of an object store, which is not supported; .*gcloud storage"),
        ("memory://it", "'memory://it' is a URL, which is not supported; expected a path of this machine"),
        ("file:///it", "'file:///it' is a URL; expected a path; give '/it'"),
        ("me@host:it", "'me@host:it' is a place on another machine; .*rsync"),
    ]:
        with pytest.raises(KcacheError, match=said) as raised:
            GIVEN[given](url, cache)
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_what_is_here_is_a_path_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s3:", "me@host:photos", "C:\\photos", "a:b", "-x", "http:"):
        Path(name).mkdir()
        assert remote(name) is remote(f"{name}/new") is remote(Path(f"{name}/a/new")) is None
    assert remote("s3://bucket") is None  # which is s3:/bucket to the system, and lies in the folder s3:
    for name in ("C:\\caches", "a:b", "runs/prior", "/gs://x", "", "x" * 5000, "nul\0"):
        assert remote(name) is None
