"""Settings that cannot be are refused when they are given, each in one message that names its flag."""

import math
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from kcache.config import BuildConfig, TrainConfig
from kcache.errors import ConfigError
from kcache.settings import marks_of, read_toml, settings_from

DECODER: dict[str, Any] = {"stage": "decoder"}
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": (512, 0)}, "--resolution is 0; expected 1 or more"),
        ({"alpha": "grey"}, "--alpha is 'grey'; expected one of white, black, drop"),
        ({"alpha": None}, "--alpha is None; expected one of white, black, drop"),
        ({"rows_per_shard": 0}, "--rows-per-shard is 0; expected 1 or more"),
        ({"worker": "4/4"}, "--worker is '4/4'; expected I/N"),
    ],
)
def test_a_build_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**settings)
    BuildConfig(rows_per_shard=None, worker="3/4")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learning_rate", "0 or more"),
        ("adam_beta1", "0 or more, and less than 1"),
        ("max_grad_norm", "a number above 0"),
        ("ema_decay", "a probability, 0 to 1"),
        ("lr_scheduler", "one of linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup"),
    ],
)
def test_a_refusal_says_what_is_taken(name: str, expected: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError) as refused:
        TrainConfig(**{"stage": "prior", "output_dir": "run", name: -1.5})
    assert str(refused.value) == f"{flag} is -1.5; expected {expected}"


def test_what_is_no_flag_is_named_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"^stage is 'unet'; expected one of prior, decoder$"):
        TrainConfig(stage="unet", output_dir="run")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output_dir"):
        TrainConfig(stage="prior")  # type: ignore[call-arg]


def test_every_setting_is_explained_in_full_sentences() -> None:
    for settings in (BuildConfig, TrainConfig):
        assert [name for name, marks in marks_of(settings).items() if not re.fullmatch("[A-Z].*\\.", marks.help)] == []


def test_every_default_is_of_its_settings_type() -> None:
    for settings in (BuildConfig, TrainConfig):
        given = {each.name: each.default for each in fields(settings) if each.default not in (None, MISSING)}
        table = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        assert settings_from(table, settings, given, where="defaults") == given


def test_numbers_at_the_ends_of_their_range_are_taken() -> None:
    TrainConfig(
        stage="prior",
        output_dir="run",
        learning_rate=0.0,
        adam_beta1=0.0,
        adam_epsilon=0.0,
        max_grad_norm=1e9,
        caption_dropout=1.0,
        use_ema=True,
        ema_decay=1.0,
        seed=2**63 - 1,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 4.0}, "--lora-alpha changes nothing without --lora-rank; expected that beside it; add that"),
        ({"lora_dropout": 0.1}, "--lora-dropout changes nothing without --lora-rank"),
        ({"lora_target_modules": ("to_q",)}, "--lora-target-modules changes nothing without --lora-rank"),
        ({"validation_steps": 5}, "changes nothing without --val-fraction or --validation-prompts"),
        ({"ema_decay": 0.9}, "--ema-decay changes nothing without --use-ema"),
        ({"new_order": True}, "--new-order changes nothing without --resume-from-checkpoint"),
        ({"online": "photos", "residency": "ram"}, "--residency ram .* with --online there are none"),
        ({"revision": "a", "prior_revision": "b"}, "--revision is a and --prior-revision b: both are of the prior"),
        ({"decoder_revision": "b"}, "this run reads no decoder, which only draws --validation-prompts"),
        ({"image_dropout": 0.1}, "--image-dropout is for the decoder"),
        ({"inpaint": True}, "--inpaint is for the decoder"),
        (DECODER | {"hole_loss": True}, "--hole-loss changes nothing without --inpaint; .* or leave --hole-loss out"),
        (
            DECODER | {"mask_growth": False},
            "--no-mask-growth changes nothing without --inpaint; .* or leave --no-mask-growth out",
        ),
        (DECODER | {"inpaint": True, "validation_prompts": ("x",)}, "--validation-prompts with --inpaint: .* val_hole"),
        (
            DECODER | {"hint": "edges", "validation_prompts": ("x",)},
            "--validation-prompts with --hint edges: .* drawn by",
        ),
        ({"validation_prompts": ("x",), "num_validation_images": 0}, "of which nothing would be drawn"),
        ({"stage": "decoder", "noise_draws": 2}, "--noise-draws is for the prior"),
        ({"num_class_rows": 5}, "--num-class-rows changes nothing without --class-prompt"),
        ({"prior_loss_weight": 2.0}, "--prior-loss-weight changes nothing without --class-prompt"),
        (
            {"class_prompt": ("a dog",), "prior_loss_weight": 0.0},
            "--prior-loss-weight is 0.0; expected a number above",
        ),
        ({"class_prompt": ("a dog", " ")}, "--class-prompt is empty; expected what the prior is to keep"),
        ({"class_prompt": ("a dog", "a dog ")}, "--class-prompt 'a dog' is given more than once; .* --num-class-rows"),
        (DECODER | {"class_prompt": ("a dog",)}, "--class-prompt is for the prior: .* cache-merge"),
        ({"noise_draws": 0}, "--noise-draws is 0; expected 1 or more"),
        ({"caption_column": "words"}, "say how to read the source of --online"),
    ],
)
def test_settings_that_need_others_are_refused_without_them(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"stage": "prior", "output_dir": "run"} | settings)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_file_of_settings_may_come_from_any_editor(encoding: str, tmp_path: Path) -> None:
    text = ("\ufeff" if encoding == "utf-16-be" else "") + 'output_dir = "r\u00e9"\r\nseed = 1\r\n'
    (tmp_path / "run.toml").write_bytes(text.encode(encoding))
    assert read_toml(tmp_path / "run.toml") == {"output_dir": "r\u00e9", "seed": 1}
    (tmp_path / "run.toml").write_text("a = " + "[" * 9999)
    with pytest.raises(ConfigError, match=r"run\.toml is not TOML: "):
        read_toml(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("kind", "needed"), [(TrainConfig, {"stage": "prior", "output_dir": "run"}), (BuildConfig, {})]
)
def test_none_is_taken_only_where_it_means_something(kind: type, needed: dict[str, Any]) -> None:
    for name, hint in get_type_hints(kind).items():
        if name in marks_of(kind) and type(None) not in get_args(hint):
            with pytest.raises(ConfigError, match=f"{name.replace('_', '.')} is None; expected "):
                kind(**needed | {name: None})
