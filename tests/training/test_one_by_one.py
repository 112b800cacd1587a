"""One parameter at a time moves as all together do, in bfloat16 with the right mean; gradients go as they are used."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import WEIGHTS, assert_equal_tensors, config, course

from kcache.errors import ConfigError
from kcache.store.checkpoint import latest_checkpoint
from kcache.training.optimizer.libraries import check_optimizer, check_placement
from kcache.training.optimizer.one_by_one import OneByOne, round_stochastically
from kcache.training.trainer import train

ALONE: dict[str, Any] = {"gradient_accumulation_steps": 1, "fused_backward": True}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_takes_one_of_two_neighbours_and_keeps_the_mean() -> None:
    values = torch.tensor([1.0 + 2**-9, -3.0 - 2**-8, 1e-3, -7e-20, 0.0, 2.0, float("inf")])
    drawn = torch.stack([round_stochastically(values, generator(seed)) for seed in range(4000)]).double()
    exact = values.double()
    away = (values.view(torch.int32) + 0xFFFF & -1 << 16).view(torch.float32).double()
    towards = (values.view(torch.int32) & -1 << 16).view(torch.float32).double()
    assert bool(((drawn == away) | (drawn == towards)).all())
    finite = exact.isfinite()
    error = (drawn.mean(0) - exact)[finite].abs()
    spread = (away - towards)[finite].abs() / 2 / 4000**0.5
    assert bool((error <= 4 * spread).all())
    assert bool((drawn == exact)[:, 4:].all())  # what bfloat16 has is not rounded


def test_updates_that_rounding_to_the_nearest_would_lose_are_learnt() -> None:
    weights = torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    optimizer = OneByOne(torch.optim.AdamW([weights], lr=1e-4, weight_decay=0.0), seed=3)
    for _ in range(50):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    assert weights.dtype == torch.bfloat16
    assert optimizer.state[weights]["exp_avg"].dtype == torch.float32
    assert float(weights.detach().float().mean()) == pytest.approx(1 - 50 * 1e-4, abs=2e-4)  # half a bfloat16 is 2e-3


def test_what_watches_for_gradients_still_does_after_a_step() -> None:
    """As data parallelism does, to sum them up."""
    weights = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    accumulator = weights.expand_as(weights).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    seen: list[int] = []
    accumulator.register_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    optimizer = OneByOne(torch.optim.AdamW([weights]))
    for step in range(3):
        weights.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(seen) == step + 1


def test_a_gradient_is_used_and_freed_in_the_backward_pass_to_the_same_weights() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    make = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    plain, fused = make(layers[0].parameters()), OneByOne(make(layers[1].parameters()), fused_backward=True)
    for step in range(3):
        inputs = torch.randn(4, 8, generator=generator(step))
        for each in layers:
            each(inputs).square().mean().backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in layers[0].parameters()])
        assert fused.midway
        assert all(parameter.grad is None for parameter in layers[1].parameters())
        torch.testing.assert_close(fused.take_norm(), norm)
        for optimizer in (plain, fused):
            optimizer.step()
            optimizer.zero_grad()
        assert not fused.midway
        assert all(torch.equal(a, b) for a, b in zip(*(each.parameters() for each in layers), strict=True))


def test_a_run_of_one_at_a_time_is_that_of_all_together(cache: str, tmp_path: Path) -> None:
    plain, fused = tmp_path / "plain", tmp_path / "fused"
    train(cache, config(plain, max_train_steps=3, gradient_accumulation_steps=1, max_grad_norm=1e9))
    train(cache, config(fused, max_train_steps=3, **ALONE, offload_optimizer=True, use_ema=True, ema_device="cpu"))
    assert [entry[::2] for entry in course(plain)] == [entry[::2] for entry in course(fused)]  # loss and learning rate
    assert [entry[1] for entry in course(plain)] == pytest.approx([entry[1] for entry in course(fused)])
    assert_equal_tensors(plain / WEIGHTS["prior"], fused / "raw" / WEIGHTS["prior"])


def test_a_step_that_fails_in_its_middle_leaves_no_checkpoint(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    move, moved = OneByOne._move, []

    def failing(self: OneByOne, number: int, parameter: torch.Tensor) -> None:
        move(self, number, parameter)
        moved.append(number)
        if self.steps == 2 and self.midway and len(set(moved[-3:])) == 3:
            raise RuntimeError("the device is gone")

    monkeypatch.setattr(OneByOne, "_move", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(cache, config(tmp_path, **ALONE))
    assert latest_checkpoint(tmp_path) is None
    assert "NO CHECKPOINT after step 2: some of the weights are those of the next" in caplog.text


BF16: dict[str, Any] = {"weights": "bf16", "mixed_precision": "bf16"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_8bit_adam": True, "optimizer": "adafactor"}, "--use-8bit-adam with --optimizer adafactor; .* leave one"),
        (BF16 | {"lora_rank": 2}, "--weights bf16 with --lora-rank 2: adapters are small"),
        ({"offload_optimizer": True, "optimizer": "prodigy"}, "--offload-optimizer with --optimizer prodigy, which"),
        ({"weights": "bf16"}, "--weights bf16 with --mixed-precision no; .* give --mixed-precision bf16"),
        (ALONE | {"gradient_accumulation_steps": 2}, "with --gradient-accumulation-steps 2: each gradient"),
        (ALONE | {"max_grad_norm": 0.5}, r"with --max-grad-norm 0\.5: .* leave --max-grad-norm out"),
        (ALONE | {"mixed_precision": "fp16"}, "--fused-backward with --mixed-precision fp16"),
        ({"ema_device": "cpu"}, "--ema-device changes nothing without --use-ema"),
        ({"optimizer": "lion"}, "--optimizer is 'lion'; expected one of adamw, adamw-8bit, adafactor, prodigy"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(Path("run"), **settings)


def test_what_changes_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    check_optimizer(config(Path("run"), optimizer="adafactor", adam_beta1=0.8, adam_weight_decay=0.1, **ALONE))
    check_optimizer(config(Path("run"), optimizer="prodigy"))
    check_optimizer(config(Path("run"), optimizer="prodigy", learning_rate=1.0))
    check_placement(config(Path("run"), offload_optimizer=True, use_ema=True, ema_device="cpu"), cpu, 2)
    assert [record.getMessage().partition(",")[0].partition(":")[0] for record in caplog.records] == [
        "--adam-beta1 changes nothing with --optimizer adafactor",
        "--fused-backward",
        "--learning-rate 0.0001 with --optimizer prodigy",
        "--offload-optimizer changes nothing here",
        "--ema-device cpu changes nothing here",
    ]
    with pytest.raises(ConfigError, match="--fused-backward with 2 processes"):
        check_placement(config(Path("run"), **ALONE), cpu, 2)
