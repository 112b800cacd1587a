"""The doctor's facts: true of this machine, without a secret, and never an exception."""

import builtins
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kcache import machine as limits
from kcache.report import doctor
from kcache.report.doctor import Fact, examine

AREAS = ["versions", "devices", "processor", "memory", "disk"]


def by_name(facts: list[Fact], area: str) -> dict[str, Fact]:
    return {fact.name: fact for fact in facts if fact.area == area}


def test_every_area_is_looked_at_and_nothing_is_broken_here(tmp_path: Path) -> None:
    facts = examine(tmp_path)
    assert list(dict.fromkeys(fact.area for fact in facts)) == AREAS
    assert [fact for fact in facts if fact.state == "broken"] == []
    assert all(fact.advice for fact in facts if fact.state != "ok")
    assert list(tmp_path.iterdir()) == []
    versions, disk = by_name(facts, "versions"), by_name(facts, "disk")
    assert versions["torch"].value == importlib.metadata.version("torch")
    assert int(disk["write"].value or 0) > 0
    assert int(disk["read"].value or 0) > 0


def test_versions_outside_of_the_range_and_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "99.0" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = by_name(examine(), "versions")
    assert (versions["torch"].state, versions["peft"].state) == ("note", "broken")
    assert "pip install 'torch<3,>=2.10'" in versions["torch"].advice
    assert "pip install 'peft" in versions["peft"].advice


@pytest.mark.parametrize("missing", ["torch", "packaging"])
def test_what_cannot_be_imported_is_a_fact(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **others: Any) -> Any:
        if name == missing or name.startswith(f"{missing}."):
            raise ImportError(f"No module named {missing!r}")
        return real(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", refuse)
    facts = examine()
    assert list(dict.fromkeys(fact.area for fact in facts)) == AREAS
    broken = {fact.name for fact in facts if fact.state == "broken"}
    assert broken == {"torch": {"torch"}}.get(missing, set())


def test_limits_of_a_container_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    for path, text in {
        "sys/fs/cgroup/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/memory.max": "1000000\n",
        "proc/meminfo": "MemTotal: 2000 kB\nMemAvailable: 1500 kB\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    facts = examine(tmp_path / "no")
    assert by_name(facts, "processor")["cgroup cores"].state == "slow"
    assert by_name(facts, "memory")["limit"].value == 1_000_000
    assert by_name(facts, "memory")["available"].value == 1500 * 1024
    assert by_name(facts, "memory")["limit"].state == "note"
    assert by_name(facts, "disk")["path"].state == "broken"


def test_a_folder_that_cannot_be_written_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    fact = by_name(examine(tmp_path), "disk")["write"]
    assert fact.state == "broken"
    assert "cannot be written (Permission denied)" in fact.advice


@pytest.mark.parametrize(("capability", "free", "states"), [((9, 0), 79, {"ok"}), ((7, 5), 10, {"ok", "note", "slow"})])
def test_a_gpu_is_described(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: int, states: set[str]
) -> None:
    device = SimpleNamespace(name="A GPU", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free * 10**9, 80 * 10**9))
    devices = {name: fact for name, fact in by_name(examine(), "devices").items() if name.startswith("cuda:0")}
    assert devices["cuda:0"].value == "A GPU"
    assert devices["cuda:0 memory"].value == 80 * 10**9
    assert {fact.state for fact in devices.values()} == states


def test_a_gpu_that_torch_does_not_see_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    for version, said in ((None, "this torch is built for the CPU"), ("13.0", "built for CUDA 13.0, and sees none")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert said in by_name(examine(), "devices")["cuda"].advice


def test_a_slow_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SLOW_DISK", math.inf)
    disk = by_name(examine(tmp_path), "disk")
    assert (disk["write"].state, disk["read"].state) == ("slow", "slow")
    assert "stage the cache" in disk["write"].advice


def test_a_file_is_not_taken_for_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, said in (("file", f"{tmp_path / 'file'} is a file"), ("no", f"there is no folder {tmp_path / 'no'}")):
        (fact,) = doctor._disk(tmp_path / name)
        assert fact.state == "broken"
        assert fact.advice.startswith(said)


def test_the_command_exits_with_one_when_something_is_broken(
    kcache_command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = Fact(area="disk", name="free", value=3_000_000, unit="bytes")
    broken = Fact(area="versions", name="torch", value=None, state="broken", advice="pip install 'torch[x]'")
    monkeypatch.setattr(doctor, "examine", lambda path: [sound])
    assert kcache_command("doctor") == 0
    assert "3.0 MB" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda path: [sound, broken])
    assert kcache_command("doctor") == 1
    said = capsys.readouterr().out
    assert "pip install 'torch[x]'" in said
    assert said.endswith("1 thing broken\n")
    assert kcache_command("doctor", "--json") == 1
    assert json.loads(capsys.readouterr().out)["broken"] == 1
