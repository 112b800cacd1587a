"""Every command that takes a cache takes the URL of one, and says so in one line where that cannot be."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from in_bucket import damage, put

from kcache import Cache
from kcache.places import place_of

Run = Callable[..., int]


@pytest.fixture
def url(cache: str, bucket: str) -> str:
    return str(put(Path(cache), f"{bucket}/photos"))


def test_commands_take_the_url_of_a_cache(
    url: str, cache: str, kcache_command: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def printed(*arguments: str) -> str:
        assert kcache_command(*arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    info = printed("cache-info", url)
    assert info.startswith(f"{url}: 10 samples")
    assert "not looked at from here: whether every shard is there; " in info
    assert "photos/: sound" in printed("cache-verify", f"{url}/")
    assert "0 paths would be removed" in printed("cache-gc", url, "--dry-run")
    printed("cache-convert", url, f"{url}-tars", "--format", "webdataset")
    printed("cache-merge", "all", url, url)
    for made in (f"{url}-tars", "all"):
        assert Cache.open(made).fingerprint == Cache.open(cache).fingerprint
    assert printed("report", url) == "photos-report.html\n"
    assert url in Path("photos-report.html").read_text()
    options = ["--report-to=none", "--max-train-steps=2", "--train-batch-size=4"]
    losses = []
    for place, run in ((url, "far"), (cache, "here")):
        printed("train-decoder", place, f"--output-dir={run}", *options)
        lines = Path(run, "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]
    assert json.loads(Path("far/config.json").read_text())["cache"]["path"] == url
    assert not {"s3:", "memory:"} & set(os.listdir())  # noqa: PTH208


def test_damage_in_a_bucket_is_told_with_its_place(
    url: str, kcache_command: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    opened = Cache.open(url)
    locator = opened.index["latents-64"][2]
    file = opened.field_files("latents").files[locator["shard"]].path
    damage(file, int(locator["latents"]["offset"]))  # type: ignore[arg-type]
    assert kcache_command("cache-verify", url) == 4
    told = capsys.readouterr()
    assert opened.samples["name"][2].as_py() in told.out
    assert f"kcache cache-verify {url} --source SOURCE --repair" in told.err
    assert kcache_command("report", url, "--output", str(tmp_path / "report.html")) in (1, 4)
    assert str(place_of(url)) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cache-info", "memory://none/at-all"], "memory://none/at-all is not a finished cache: there is nothing"),
        (["cache-build", "photos", "memory://none/c"], "memory://none/c is gone when this command ends"),
        (["cache-convert", "CACHE", "memory://none/c", "--format=zarr"], "is gone when this command ends; expected a"),
        (["cache-merge", "memory://none/c", "CACHE"], "memory://none/c is gone when this command ends"),
        (["cache-gc", "hf://datasets/a/b"], "which is only read"),
        (["cache-convert", "CACHE", "hf://datasets/a/b", "--format=zarr"], "which is only read"),
        (["report", "CACHE", "--output=s3://bucket/report.html"], "is in an object store; expected a path"),
        (["train-prior", "s3://k:hunter2@bucket/c", "--output-dir=run"], "with a name or password in it"),
        (["train-prior", "memory://none/c", "--output-dir=s3://bucket/run"], "is in an object store; expected a path"),
        (["train-prior", "memory://none/c", "--output-dir=run"], "memory://none/c is not a finished cache"),
        (["report", "memory://none/c"], "memory://none/c is not a finished cache"),
        (["sample", "a fox", "--output-dir=s3://bucket/run"], "'s3://bucket/run' is in an object store"),
        (["sample", "a fox", "--prior=s3://bucket/run"], "'s3://bucket/run' is in an object store"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str], said: str, cache: str, kcache_command: Run, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert kcache_command(*(cache if argument == "CACHE" else argument for argument in arguments)) == 1
    told = capsys.readouterr()
    assert said in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert "hunter2" not in told.out + told.err
    assert not list(tmp_path.iterdir())
