"""What moves the weights can be put into named tensors and taken out again, exactly."""

import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import PriorTransformer
from safetensors.torch import save_file

from kcache.config import LrScheduler, TrainConfig
from kcache.errors import ConfigError, RunError
from kcache.training.optimizer.average import averaged, make_average, restore_average
from kcache.training.optimizer.kept import optimizer_tensors, restore_optimizer
from kcache.training.optimizer.learning import trainable_parameters
from kcache.training.optimizer.libraries import check_optimizer, make_optimizer
from kcache.training.optimizer.schedule import go_on, make_schedule

CPU = torch.device("cpu")


def make_network() -> PriorTransformer:
    torch.manual_seed(0)
    network = PriorTransformer(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, embedding_dim=8, num_embeddings=4
    )
    network.clip_mean.requires_grad_(False)
    network.clip_std.requires_grad_(False)
    return network


def config(**settings: object) -> TrainConfig:
    return TrainConfig(stage="prior", output_dir="run", learning_rate=1e-2, **settings)  # type: ignore[arg-type]


def take_steps(network: PriorTransformer, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for number, parameter in enumerate(trainable_parameters(network).values()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) * (number + 1))
        optimizer.step()


@pytest.mark.parametrize("name", get_args(LrScheduler))
@pytest.mark.parametrize(("warm_up", "before", "after", "step"), [(0, 10, 20, 10), (3, 20, 10, 7), (4, 8, 16, 2)])
def test_a_schedule_of_another_length_goes_on_as_if_it_had_always_been_so_long(
    name: str, warm_up: int, before: int, after: int, step: int
) -> None:
    settings = config(lr_scheduler=name, lr_warmup_steps=warm_up)

    def course(steps: int, length: int, begun: int = 0, told: dict[str, Any] | None = None) -> list[float]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], settings.learning_rate)
        schedule = make_schedule(optimizer, settings, length)
        if told is not None:
            schedule.load_state_dict(told)
            go_on(schedule, optimizer, begun)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        states.append(schedule.state_dict())
        return rates

    states: list[dict[str, Any]] = []
    course(step, before)
    assert course(after - step, after, step, states[-1]) == course(after, after)[step:]


def test_an_optimizer_goes_on_from_its_tensors_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole, parts = make_network(), make_network()
    take_steps(whole, make_optimizer(whole, config(), CPU), 0, 5)

    first = make_optimizer(parts, config(), CPU)
    take_steps(parts, first, 0, 3)
    save_file(optimizer_tensors(first, parts), tmp_path / "optimizer.safetensors")
    second = make_optimizer(parts, config(), CPU)
    restore_optimizer(tmp_path / "optimizer.safetensors", second, parts)
    take_steps(parts, second, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters(), whole.parameters(), strict=True))


def test_clip_statistics_do_not_learn() -> None:
    assert not {"clip_mean", "clip_std"} & trainable_parameters(make_network()).keys()


def test_another_networks_state_is_refused(tmp_path: Path) -> None:
    network = make_network()
    optimizer = make_optimizer(network, config(), CPU)
    take_steps(network, optimizer, 0, 1)
    save_file(optimizer_tensors(optimizer, network), tmp_path / "optimizer.safetensors")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(RunError, match="parameters that the network does not train"):
        restore_optimizer(tmp_path / "optimizer.safetensors", torch.optim.AdamW(other.parameters()), other)


def test_the_average_follows_its_formula_and_comes_back(tmp_path: Path) -> None:
    network = make_network()
    average = make_average(network, config(use_ema=True, ema_decay=0.9))
    expected = {name: value.detach().clone() for name, value in trainable_parameters(network).items()}
    for step in range(1, 7):
        for parameter in trainable_parameters(network).values():
            parameter.data.add_(0.5)
        average.step(trainable_parameters(network).values())
        # The first step has nothing to keep; then (1 + n) / (10 + n) after n earlier ones, up to the decay.
        decay = min(0.9, step / (9 + step)) if step > 1 else 0.0
        for name, value in trainable_parameters(network).items():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    for tensor, value in zip(average.shadow_params, expected.values(), strict=True):
        torch.testing.assert_close(tensor, value)

    save_file(dict(zip(expected, average.shadow_params, strict=True)), tmp_path / "ema.safetensors")
    again = make_average(make_network(), config(use_ema=True, ema_decay=0.9))
    restore_average(tmp_path / "ema.safetensors", again, network, 6)
    for restored in (average, again):
        restored.step(trainable_parameters(network).values())
    assert all(torch.equal(a, b) for a, b in zip(average.shadow_params, again.shadow_params, strict=True))


def test_an_average_that_lacks_a_parameter_is_refused(tmp_path: Path) -> None:
    network = make_network()
    average = make_average(network, config())
    names = list(trainable_parameters(network))
    save_file(dict(zip(names[1:], average.shadow_params[1:], strict=True)), tmp_path / "ema.safetensors")
    with pytest.raises(RunError, match=f"no average of {names[0]}"):
        restore_average(tmp_path / "ema.safetensors", average, network, 1)


def test_weights_are_averaged_within_the_block_and_their_own_after_it() -> None:
    network = make_network()
    average = make_average(network, config())
    before = network.proj_in.weight.detach().clone()
    network.proj_in.weight.data.add_(1.0)
    with averaged(average, network):
        assert torch.equal(network.proj_in.weight, before)
    assert torch.equal(network.proj_in.weight, before + 1.0)
    with averaged(None, network):
        assert torch.equal(network.proj_in.weight, before + 1.0)


def test_an_optimizer_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    wanted = r" needs bitsandbytes .* pip install 'kcache\[bitsandbytes\]',"
    asked = {"--use-8bit-adam": {"use_8bit_adam": True}, "--optimizer adamw-8bit": {"optimizer": "adamw-8bit"}}
    for flag, settings in asked.items():
        with pytest.raises(ConfigError, match=flag + wanted):
            check_optimizer(config(**settings))
    check_optimizer(config())
