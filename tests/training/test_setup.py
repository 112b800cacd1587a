"""A run is set up from what was asked for, and what cannot be done of it is refused before the first step."""

from pathlib import Path
from typing import Any

import pytest
from short_runs import config

from kcache.errors import ConfigError, ModelError
from kcache.store.cache import Cache
from kcache.training import setup
from kcache.training.setup import prepare_run

BOTH = {"pretrained_prior_model_name_or_path": "o/prior", "pretrained_decoder_model_name_or_path": "o/decoder"}


@pytest.mark.parametrize(
    ("stage", "settings", "found"),
    [
        ("prior", {}, {"prior": None}),
        ("prior", {"revision": "a"}, {"prior": "a"}),
        ("prior", {"prior_revision": "a"}, {"prior": "a"}),
        ("decoder", {"revision": "a", "decoder_revision": "a"}, {"decoder": "a"}),
        ("prior", {"revision": "a", "validation_prompts": ("x",)}, {"prior": "a", "decoder": None}),
        (
            "decoder",
            {"revision": "a", "prior_revision": "b", "validation_prompts": ("x",)},
            {"decoder": "a", "prior": "b"},
        ),
    ],
)
def test_a_revision_is_of_its_own_repository(
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    settings: dict[str, Any],
    found: dict[str, str | None],
) -> None:
    asked: dict[str, str | None] = {}

    def find(name: str, revision: str | None, *rest: Any) -> None:
        asked[name.removeprefix("o/")] = revision

    monkeypatch.setattr(setup, "find_repository", find)
    given, opened = config(tmp_path, stage, **BOTH, **settings), Cache.open(cache)
    setup._find_base(opened, given)
    setup._find_counterpart(opened, given)
    assert asked == found


@pytest.mark.parametrize(
    ("stage", "settings", "said"),
    [
        ("prior", {"revision": "main"}, "--revision is main, but .* is a folder on this machine"),
        ("decoder", {"decoder_revision": "main"}, "--decoder-revision is main, but .* is a folder on this machine"),
        (
            "prior",
            {"decoder_revision": "main", "validation_prompts": ("x",)},
            "--decoder-revision is main, but .* is a folder on this machine",
        ),
        ("prior", {"residency": "gpu"}, "--residency gpu was given, but the run computes on the CPU"),
        ("prior", {"lora_rank": 33}, "--lora-rank is 33; .* expected at most 32"),
        ("decoder", {"lora_rank": 10**6, "lora_target_modules": ("to_q",)}, "--lora-rank is 1000000; .* at most"),
    ],
)
def test_what_was_asked_for_is_done_or_refused(
    cache: str, tmp_path: Path, stage: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare_run(cache, config(tmp_path / "run", stage, **settings))
    assert not (tmp_path / "run").exists()


def test_what_changes_nothing_is_said(cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    idle = {"lr_warmup_steps": 9, "num_validation_images": 4, "hub_model_id": "me/fox"}
    prepare_run(cache, config(tmp_path, **idle))
    assert [record.getMessage() for record in caplog.records] == [
        "--lr-warmup-steps changes nothing without --lr-scheduler; expected that beside it",
        "--num-validation-images changes nothing without --validation-prompts or --inpaint or --hint; expected that "
        "beside it",
        "--hub-model-id changes nothing without --push-to-hub; expected that beside it",
    ]


def test_a_repository_that_is_not_there_any_more_is_asked_for_by_its_flag(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Cache.open(cache)
    models = {**opened.models, "decoder": {"name": "/gone/decoder", "revision": None}}
    monkeypatch.setattr(Cache, "models", models)
    with pytest.raises(
        ModelError, match=r"/gone/decoder is a folder that is not there; .* now by --pretrained-decoder-model"
    ):
        prepare_run(opened, config(tmp_path, "decoder"))
    with pytest.raises(ModelError, match=r"o/decoder@main names a revision; .* o/decoder, .*--decoder-revision main"):
        prepare_run(opened, config(tmp_path, "decoder", pretrained_decoder_model_name_or_path="o/decoder@main"))
