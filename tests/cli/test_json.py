"""What commands print as JSON has the fields and types that docs/json.md says, and no others."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from in_bucket import put
from small_builds import copy_pictures

import kcache.build.estimate
from kcache import Cache
from kcache.build.plan import Plan, freeze_plan, plan_table
from kcache_cli import app as cli

DOCUMENT = Path(__file__).parents[2] / "docs" / "json.md"
NAMES = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "list",
    type(None): "null",
}
Said = dict[str, set[str]]
"""The types of each field, by its path."""


def documented() -> dict[str, Said]:
    """What the tables of the document say, by the headings above them."""
    tables = {}
    for section in re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|[^|]*\|[^|]*\|$", section, re.MULTILINE)
        tables[section.splitlines()[0]] = {path: set(types.split(" or ")) for path, types in rows}
        assert len(rows) == section.count("\n| `")
    return tables


def observed(value: Any, said: Said, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and type of everything in `value` that is not below what the document leaves closed."""
    if path:
        yield path, NAMES[type(value)]
    if isinstance(value, dict):
        inside = f"{path}." if path else ""
        wild = f"{inside}*" in said
        if wild or not path or any(known.startswith(inside) for known in said):
            for name, item in value.items():
                yield from observed(item, said, f"{inside}*" if wild else f"{inside}{name}")
    elif isinstance(value, list) and f"{path}[]" in said:
        for item in value:
            yield from observed(item, said, f"{path}[]")


def assert_as_said(heading: str, *values: dict[str, Any]) -> None:
    said, found = documented()[heading], Said()
    for value in values:
        for path, kind in observed(value, said):
            found.setdefault(path, set()).add(kind)
    assert found.keys() == said.keys()
    for path, kinds in found.items():
        assert kinds <= said[path] | ({"integer"} if "number" in said[path] else set()), path


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What a command prints on stdout, which is to be JSON; `status` is what it is to exit with."""

    def printed(*arguments: str, status: int = 0) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["kcache", *arguments])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        captured = capsys.readouterr()
        assert (exited.value.code or 0) == status, captured.err
        return dict(json.loads(captured.out))

    return printed


Printed = Callable[..., dict[str, Any]]


def test_caches(oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Printed) -> None:
    monkeypatch.setattr(kcache.build.estimate, "MEASURED_SECONDS", 0.01)
    source, cache = copy_pictures(oracle, tmp_path / "pictures", 4), tmp_path / "cache"
    (source / "img_03.png").write_bytes(b"no picture")
    (source / "img_02.txt").write_text("")
    models = [f"--pretrained-{half}-model-name-or-path={oracle / half}" for half in ("prior", "decoder")]
    build = ["cache-build", str(source), str(cache), *models, "--resolution=64", "--batch-size=4", "--json"]
    planned = printed(*build, "--dry-run")
    assert_as_said("cache-build --dry-run", planned)
    built = printed(*build)
    assert_as_said("cache-build", built, printed(*build))
    assert built["rejected"] == 1

    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    recipe = Cache.open(cache).recipes["text"]
    table = plan_table(recipe, [bytes(16)], (), (), rows_per_shard=64, first_shard=0)
    freeze_plan(unfinished, Plan(tables=(table,)))
    far = put(cache, f"memory://json/{tmp_path.name}")
    counts = f"--weight={cache}=0.5", f"--repeats={cache}=2"
    printed("cache-merge", str(tmp_path / "counted"), str(cache), *counts, "--json")
    info = [printed("cache-info", str(each), "--json") for each in (cache, unfinished, far, tmp_path / "counted")]
    assert_as_said("cache-info", *info, printed("cache-info", str(cache), "--caption-cosine", "--json"))
    groups = ["cache-duplicates", str(cache), "--cosine=0.01", "--json"]
    assert_as_said("cache-duplicates", printed(*groups), printed(*groups, f"--output={tmp_path / 'groups.jsonl'}"))

    new, merged = str(tmp_path / "new"), str(tmp_path / "merged")
    convert = printed("cache-convert", str(cache), new, "--format=webdataset", "--json")
    assert_as_said("cache-convert, cache-merge", convert, printed("cache-merge", merged, str(cache), "--json"))
    (tmp_path / "merged" / ".tmp-dead").write_bytes(b"half a file")
    assert_as_said("cache-gc", printed("cache-gc", merged, "--json"))
    assert_as_said("report", printed("report", str(cache), "--json"))

    (cache / "mine.txt").write_text("a note")
    verify = ["cache-verify", str(cache), "--source", str(source), "--json"]
    sound = printed(*verify, "--against-online=2")
    latents = Cache.open(cache).field_files("latents").files[0].path
    latents.write_bytes(b"\1" + latents.read_bytes()[1:])
    (cache / "rejected.jsonl").write_text("{}")
    corrupt = printed("cache-verify", str(cache), "--json", status=4)
    assert_as_said("cache-verify", sound, corrupt, printed(*verify, "--repair"))


def test_training(cache: str, tmp_path: Path, printed: Printed) -> None:
    run = ["train-decoder", cache, f"--output-dir={tmp_path}", "--report-to=none", "--max-train-steps=1"]
    again = printed(*run, "--resume-from-checkpoint=latest", "--checkpointing-steps=1")
    assert again["step"] == 1
    assert_as_said("train-prior, train-decoder", again, printed(*run, "--resume-from-checkpoint=latest"))


def test_dry_runs(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Printed) -> None:
    monkeypatch.setattr("kcache.forecast.advice.TAKE_LESS", (("gradient_checkpointing", True),))
    run = ["train-prior", cache, f"--output-dir={tmp_path / 'run'}", "--dry-run", "--json", "--train-batch-size=8"]
    whole, decoder = printed(*run), printed("train-decoder", *run[1:])
    room = whole["peak"] - whole["memory"]["rows"] - 1
    halved = printed(*run, f"--device-memory={room}")
    assert_as_said("train-prior, train-decoder --dry-run", whole, decoder, halved)
    assert not (tmp_path / "run").exists()


def test_doctor(tmp_path: Path, printed: Printed) -> None:
    assert_as_said("doctor", printed("doctor", "--path", str(tmp_path), "--json"))


def test_every_command_with_json_is_documented() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    told = {name for name, command in commands.items() if any("--json" in p.opts for p in command.params)}
    headings = {name for heading in documented() for name in heading.removesuffix(" --dry-run").split(", ")}
    assert told == headings
