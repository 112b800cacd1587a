"""Where a run computes: what cannot be used is refused in words of its own, and what works is left to accelerate."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from short_runs import config
from torch import Tensor

from kcache.errors import ConfigError, RunError
from kcache.training.accelerator import check_others, choose_trackers, make_accelerator


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """accelerate keeps what it finds, also in the environment, for the whole process: not for other tests."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def without_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.training.accelerator.get_available_trackers", list)


def test_a_run_alone_is_one_process(tmp_path: Path) -> None:
    accelerator = make_accelerator(config(tmp_path, gradient_accumulation_steps=3))
    assert (accelerator.num_processes, accelerator.is_main_process) == (1, True)
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator.trackers == []


def test_one_run_after_another_may_have_another_precision(tmp_path: Path) -> None:
    assert make_accelerator(config(tmp_path, mixed_precision="bf16")).mixed_precision == "bf16"
    assert make_accelerator(config(tmp_path)).mixed_precision == "no"


@pytest.mark.parametrize("tracker", ["wandb", "nonsense"])
@pytest.mark.usefixtures("without_trackers")
def test_a_tracker_that_is_missing_is_named_and_nothing_else(tmp_path: Path, tracker: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--report-to is '{tracker}'; found no tracker installed; .*wandb"):
        make_accelerator(config(tmp_path, report_to=tracker))


@pytest.mark.usefixtures("without_trackers")
def test_without_tensorboard_a_run_goes_on_without_it() -> None:
    assert choose_trackers("tensorboard") == choose_trackers("none") == choose_trackers("all") == []


def test_half_precision_on_a_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match=r"^--mixed-precision fp16 cannot be used here"):
        make_accelerator(config(tmp_path, mixed_precision="fp16"))


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Meg")])
def test_launchers_that_split_the_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ConfigError, match=rf"^accelerate is set up for {name}.*expected data parallelism.*torchrun"):
        make_accelerator(config(tmp_path))
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "false")
    make_accelerator(config(tmp_path))


class OddStrides(torch.autograd.Function):
    """Gives the weight of a 1×1 convolution the gradient that cuDNN may give it: equal, in other strides."""

    @staticmethod
    def forward(context: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        _, inputs, *_ = gradient.shape
        return gradient.contiguous().as_strided(gradient.shape, (inputs, 1, inputs, inputs))


class Convolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 4, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(pictures, OddStrides.apply(self.weight))


def test_launched_processes_are_a_group_and_say_nothing_of_strides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    # Launchers set the number of threads, and accelerate warns where none did.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    group = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerator = make_accelerator(config(tmp_path))
        assert torch.distributed.is_initialized()
        convolution = accelerator.prepare(Convolution())
        assert isinstance(convolution, torch.nn.parallel.DistributedDataParallel)
        convolution(torch.rand(2, 4, 3, 3)).sum().backward()
    assert convolution.module.weight.grad.stride() == (4, 1, 4, 4)


def test_what_a_collective_makes_of_a_process_that_has_ended_is_said() -> None:
    check_others(ValueError("gloo"))
    check_others(RuntimeError("shapes differ"))
    closed = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:20365: Connection reset"
    for error in (RuntimeError(closed), torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0.")):
        with pytest.raises(RunError, match="another process of this run has ended"):
            check_others(error)
