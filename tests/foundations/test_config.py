"""Settings that cannot be are refused when they are given, each in one message that names its flag."""

import math
from typing import Any

import pytest

from kcache.config import TrainConfig
from kcache.errors import ConfigError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", [-1e-4, NAN, INF]),
        ("adam_beta1", [-0.1, 1.0, NAN]),
        ("adam_beta2", [-0.1, 1.5, NAN]),
        ("adam_weight_decay", [-1.0, NAN, INF]),
        ("adam_epsilon", [-1e-8, NAN]),
        ("max_grad_norm", [0.0, -1.0, NAN, INF]),
        ("snr_gamma", [0.0, -5.0, NAN, INF]),
        ("lora_rank", [0, -1]),
        ("lora_alpha", [0.0, -1.0, NAN, INF]),
        ("lora_dropout", [1.0, -0.1, NAN]),
        ("ema_decay", [1.1, -0.1, NAN]),
        ("val_fraction", [1.1, -0.1, NAN]),
        ("caption_dropout", [1.1, -0.1, NAN]),
        ("seed", [-1, 2**63]),
        ("max_train_steps", [0]),
        ("checkpointing_steps", [0]),
        ("checkpoints_total_limit", [0]),
        ("validation_steps", [0]),
        ("lr_warmup_steps", [-1]),
        ("lr_scheduler", ["cosin"]),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, values: list[Any]) -> None:
    flag = "--" + name.replace("_", "-")
    for value in values:
        settings: dict[str, Any] = {"lora_rank": 4, "val_fraction": 0.1} | {name: value}
        with pytest.raises(ConfigError, match=f"^{flag} is {value!r}; expected"):
            TrainConfig(**{"stage": "prior", "output_dir": "run"} | settings)


def test_numbers_at_the_ends_of_their_range_are_taken() -> None:
    TrainConfig(
        stage="prior",
        output_dir="run",
        learning_rate=0.0,
        adam_beta1=0.0,
        adam_epsilon=0.0,
        max_grad_norm=1e9,
        caption_dropout=1.0,
        ema_decay=1.0,
        seed=2**63 - 1,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 4.0}, "--lora-alpha is for adapters; expected a --lora-rank"),
        ({"lora_dropout": 0.1}, "--lora-dropout is for adapters"),
        ({"lora_target_modules": ("to_q",)}, "--lora-target-modules is for adapters"),
        ({"validation_steps": 5}, "--validation-steps says when, but not what to look at"),
        ({"image_dropout": 0.1}, "--image-dropout is for the decoder"),
        ({"stage": "decoder", "noise_draws": 2}, "--noise-draws is for the prior"),
        ({"noise_draws": 0}, "--noise-draws is 0; expected 1 or more"),
        ({"caption_column": "words"}, "say how to read the source of --online"),
    ],
)
def test_settings_that_need_others_are_refused_without_them(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"stage": "prior", "output_dir": "run"} | settings)
