"""A device that is not there is refused by name, before anything else, wherever one can be asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kcache.errors import ConfigError
from kcache.machine import check_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this a machine with so many CUDA GPUs."""

    def have(count: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return have


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:9", "mps", "meta", "nonsense", "cuda:x", ""])
def test_without_a_gpu_there_is_the_cpu(gpus: Callable[[int], None], asked: str) -> None:
    gpus(0)
    with pytest.raises(ConfigError, match=f"--device is '{asked}'.*found cpu here; type --device cpu, or leave it out"):
        check_device(asked)
    for there in (None, "cpu", "cpu:0"):
        check_device(there)


def test_of_several_gpus_each_is_there(gpus: Callable[[int], None]) -> None:
    gpus(2)
    for there in ("cuda", "cuda:0", "cuda:1", "cpu"):
        check_device(there)
    for asked in ("cuda:2", "mps"):
        with pytest.raises(ConfigError, match=r"found cuda:0, cuda:1, cpu here; type --device cuda:0"):
            check_device(asked)


@pytest.mark.parametrize(
    "command",
    [
        ["cache-build", "data", "new"],
        ["cache-build", "data", "new", "--dry-run"],
        ["cache-verify", "cache", "--source=data", "--repair"],
        ["cache-verify", "cache", "--source=data", "--against-online=2"],
        ["report", "cache", "--pretrained-decoder-model-name-or-path=nowhere"],
        ["sample", "a fox", "--prior=nowhere", "--decoder=nowhere"],
    ],
)
def test_every_command_refuses_it_first(
    gpus: Callable[[int], None],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kcache_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus(0)
    monkeypatch.chdir(tmp_path)
    Path("cache").mkdir()
    Path("cache/manifest.json").touch()
    assert kcache_command(*command, "--device", "cuda:9") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kcache: --device is 'cuda:9'")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
