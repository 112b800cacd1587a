"""Training from a real cache: determined, exact in its steps, the same after an interruption and online."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import upstream_loop
from counted import COUNTS, counted_cache
from diffusers import AutoPipelineForText2Image, ModelMixin, PriorTransformer
from safetensors.torch import load_file
from short_runs import STAGES, WEIGHTS, assert_equal_weights, config, course
from transformers import PreTrainedModel

import kcache.disk.memo
import kcache.encoders.weights
import kcache.training.run
from kcache.errors import CacheIncompleteError, CacheMismatchError, CacheWriteError, ConfigError, ModelError, RunError
from kcache.objectives.errors import Batch
from kcache.objectives.losses import DecoderObjective, Objective, PriorObjective
from kcache.store.cache import Cache
from kcache.store.run_directory import read_metrics
from kcache.training.trainer import Progress, train


class Killed(BaseException):
    pass


def kill_at(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step >= step:
            raise Killed

    return report


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """The rows, noise and timesteps that runs feed to their networks, batch after batch."""
    batches = []
    for kind in (PriorObjective, DecoderObjective):

        def predict(
            self: Objective, batch: Batch, noise: torch.Tensor, timesteps: torch.Tensor, real: Any = kind.predict
        ) -> Any:
            batches.append((dict(batch), noise, timesteps))
            return real(self, batch, noise, timesteps)

        monkeypatch.setattr(kind, "predict", predict)
    return batches


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_are_those_of_a_plain_loop_of_the_upstream_mathematics(
    oracle: Path, cache: str, tmp_path: Path, fed: list[Any], stage: str, rank: int | None, snr_gamma: float | None
) -> None:
    settings = {"gradient_accumulation_steps": 1, "max_train_steps": 10, "learning_rate": 1e-3, "lora_rank": rank}
    train(cache, config(tmp_path, stage, snr_gamma=snr_gamma, **settings))
    expected = upstream_loop.losses(oracle, stage, fed, rank=rank, snr_gamma=snr_gamma, learning_rate=1e-3)
    losses = [loss for loss, _, _ in course(tmp_path)]
    assert losses == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert losses[-1] != pytest.approx(upstream_loop.losses(oracle, stage, fed, rank=rank, snr_gamma=snr_gamma)[-1])


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_loads_no_encoder_and_digests_nothing(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    loaded = []

    def watched(
        kind: type[Any], *arguments: Any, real: Any = ModelMixin.from_pretrained.__func__, **settings: Any
    ) -> Any:
        loaded.append(kind.__name__)
        return real(kind, *arguments, **settings)

    def refused(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError(f"{arguments} is read again")

    def digest(file: Any, *settings: Any, real: Any = hashlib.file_digest) -> Any:
        assert Path(file.name).is_relative_to(tmp_path), f"{file.name} is read again"
        return real(file, *settings)

    # The models have only just been written, and might change again within a tick of the clock.
    monkeypatch.setattr(kcache.disk.memo, "_RACY_NS", 0)
    train(cache, config(tmp_path / "first", stage))
    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(watched))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refused)
    monkeypatch.setattr(hashlib, "file_digest", digest)
    train(cache, config(tmp_path / "second", stage))
    assert loaded == ["PriorTransformer" if stage == "prior" else "UNet2DConditionModel"]


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("prior", {"gradient_checkpointing": True, "lora_dropout": 0.5}),
        ("decoder", {"gradient_checkpointing": True, "lora_dropout": 0.5}),
        ("prior", {"packing": False}),
        ("prior", {"residency": "mmap"}),
    ],
)
def test_what_only_saves_time_or_memory_changes_no_loss(
    cache: str, tmp_path: Path, stage: str, settings: dict[str, Any]
) -> None:
    dropout = settings.get("lora_dropout", 0.0)
    train(cache, config(tmp_path / "without", stage, lora_rank=2, lora_dropout=dropout))
    train(cache, config(tmp_path / "with", stage, lora_rank=2, **settings))
    for other, plain in zip(course(tmp_path / "with"), course(tmp_path / "without"), strict=True):
        assert other == pytest.approx(plain, rel=1e-5)


def test_further_draws_of_noise_are_added_to_the_first(cache: str, tmp_path: Path, fed: list[Any]) -> None:
    train(cache, config(tmp_path / "one", max_train_steps=2, snr_gamma=5.0))
    one = list(fed)
    train(cache, config(tmp_path / "three", max_train_steps=2, snr_gamma=5.0, noise_draws=3))
    train(cache, config(tmp_path / "padded", max_train_steps=2, snr_gamma=5.0, noise_draws=3, packing=False))
    for (_, noise, timesteps), (_, first, first_timesteps) in zip(fed[len(one) :], one * 2, strict=True):
        assert len(noise) == 3 * len(first)
        assert torch.equal(noise[::3], first)
        assert torch.equal(timesteps[::3], first_timesteps)
    for packed, padded in zip(course(tmp_path / "three"), course(tmp_path / "padded"), strict=True):
        assert packed == pytest.approx(padded, rel=1e-5)
    assert course(tmp_path / "three") != course(tmp_path / "one")


def test_the_seed_decides_the_dropout_of_adapters(cache: str, tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        torch.rand(seed)  # what was drawn before has no say
        train(cache, config(tmp_path / name, seed=seed, lora_rank=2, lora_dropout=0.5))
    train(cache, config(tmp_path / "none", seed=1, lora_rank=2))
    assert course(tmp_path / "first") == course(tmp_path / "again")
    # With B at zero the adapters have no say in the first step, dropout or not, but for its gradient.
    assert [loss for loss, _, _ in course(tmp_path / "none")][1:] != [
        loss for loss, _, _ in course(tmp_path / "first")
    ][1:]
    assert course(tmp_path / "other") != course(tmp_path / "first")


def test_a_directory_that_cannot_be_made_is_refused(cache: str, tmp_path: Path) -> None:
    with pytest.raises(CacheWriteError, match=r"could not be written \(File name too long\)"):
        train(cache, config(tmp_path / ("long" * 100)))


def test_a_missing_counterpart_is_refused_before_anything_is_loaded_or_made(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kcache.training.setup, "load_objective", lambda *_: pytest.fail("loaded"))
    missing = {"pretrained_decoder_model_name_or_path": str(tmp_path / "none"), "validation_prompts": ("a fox",)}
    with pytest.raises(ModelError, match=r"none is a folder that is not there; expected"):
        train(cache, config(tmp_path / "run", **missing))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_are_seven_and_a_resume_and_thirteen(cache: str, tmp_path: Path, stage: str) -> None:
    settings = {
        "max_train_steps": 20,
        "checkpointing_steps": 7,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 3,
        "snr_gamma": 5.0,
    }
    train(cache, config(tmp_path / "whole", stage, **settings))
    with pytest.raises(Killed):
        train(cache, config(tmp_path / "parts", stage, **settings), report=kill_at(10))
    assert len(read_metrics(tmp_path / "parts")) == 10
    state = json.loads((tmp_path / "parts" / "checkpoint-7" / "state.json").read_text())["state"]
    assert state["loader"]["samples_consumed"] % len(Cache.open(cache)) != 0
    result = train(cache, config(tmp_path / "parts", stage, **settings, resume_from_checkpoint="latest"))

    assert result.step == 20
    assert len(course(tmp_path / "whole")) == 20
    assert course(tmp_path / "parts") == course(tmp_path / "whole")
    assert_equal_weights(tmp_path / "parts", tmp_path / "whole", stage)


def test_a_run_resumes_from_a_checkpoint_of_another_directory(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path / "first", max_train_steps=6, checkpointing_steps=3))
    path = str(tmp_path / "first" / "checkpoint-3")
    train(cache, config(tmp_path / "second", max_train_steps=6, resume_from_checkpoint=path))
    assert course(tmp_path / "second") == course(tmp_path / "first")[3:]
    assert_equal_weights(tmp_path / "second", tmp_path / "first", "prior")


@pytest.mark.parametrize("stage", STAGES)
def test_thirty_steps_from_the_cache_equal_thirty_with_the_encoders_in_the_loop(
    oracle: Path, cache: str, tmp_path: Path, stage: str
) -> None:
    train(cache, config(tmp_path / "cached", stage, max_train_steps=30))
    train(cache, config(tmp_path / "online", stage, max_train_steps=30, online=str(oracle / "data")))
    assert len(course(tmp_path / "cached")) == 30
    assert course(tmp_path / "online") == course(tmp_path / "cached")
    assert_equal_weights(tmp_path / "online", tmp_path / "cached", stage)


def test_a_step_is_the_same_however_its_batch_is_split(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path / "two", train_batch_size=4, gradient_accumulation_steps=1))
    train(cache, config(tmp_path / "four", train_batch_size=1, gradient_accumulation_steps=4))
    for split, whole in zip(course(tmp_path / "four"), course(tmp_path / "two"), strict=True):
        assert split == pytest.approx(whole, rel=1e-4)


def test_the_learning_rate_follows_its_schedule_to_the_end(cache: str, tmp_path: Path) -> None:
    settings = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "learning_rate": 1e-3, "checkpointing_steps": 6}
    train(cache, config(tmp_path, max_train_steps=6, **settings))
    assert [lr for _, _, lr in course(tmp_path)] == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    state = json.loads((tmp_path / "checkpoint-6" / "state.json").read_text())["state"]
    assert state["lr_scheduler"]["_last_lr"] == [0.0]


def test_epochs_are_counted_in_samples(cache: str, tmp_path: Path) -> None:
    samples = len(Cache.open(cache))
    result = train(cache, config(tmp_path, max_train_steps=None, num_train_epochs=3))
    assert result.step == -(-3 * samples // 4)


def test_what_samples_count_is_learnt_from_and_gone_on_with_bit_for_bit(
    oracle: Path, cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Epochs count turns; the encoders in the loop do as the cache; held-out samples are measured as without."""
    counted, samples = counted_cache(cache, tmp_path / "counted"), len(Cache.open(cache))
    turns = sum(COUNTS[i % len(COUNTS)][1] for i in range(samples))
    asked: dict[str, Any] = {"max_train_steps": None, "num_train_epochs": 2, "shuffle": "stream"}
    with caplog.at_level("WARNING"):
        whole = train(counted, config(tmp_path / "whole", **asked, checkpointing_steps=3))
    assert whole.step == -(-2 * turns // 4)
    assert f"{turns} turns an epoch of {samples} samples" in caplog.text
    assert "samples have weights" in caplog.text
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["turns"] == turns
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    train(counted, config(tmp_path / "parts", **asked, resume_from_checkpoint=checkpoint))
    assert course(tmp_path / "parts") == course(tmp_path / "whole")[3:]
    assert_equal_weights(tmp_path / "parts", tmp_path / "whole", "prior")
    train(counted, config(tmp_path / "online", **asked, online=str(oracle / "data")))
    assert course(tmp_path / "online") == course(tmp_path / "whole")
    with pytest.raises(CacheMismatchError, match="other pictures, captions, weights or repeats"):
        train(cache, config(tmp_path / "other", **asked, resume_from_checkpoint=checkpoint))
    looked: dict[str, Any] = {"max_train_steps": 1, "val_fraction": 0.3, "learning_rate": 0.0, "validation_steps": 1}
    for name, path in (("weighted", counted), ("plain", cache)):
        train(path, config(tmp_path / name, **looked))
    seen = [(tmp_path / name / "validation.jsonl").read_text() for name in ("weighted", "plain")]
    assert seen[0] == seen[1]


def test_nothing_is_left_to_do_at_the_last_step(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path, checkpointing_steps=4))
    before = (tmp_path / WEIGHTS["prior"]).read_bytes()
    result = train(cache, config(tmp_path, resume_from_checkpoint="latest"))
    assert (result.step, result.loss) == (4, None)
    assert (tmp_path / WEIGHTS["prior"]).read_bytes() == before
    assert len(read_metrics(tmp_path)) == 4


def test_latest_starts_fresh_where_there_is_nothing_yet_and_says_so(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        train(cache, config(tmp_path / "new"), report=kill_at(1))
    assert not caplog.records
    for step in (4, 4):
        train(cache, config(tmp_path / "new", resume_from_checkpoint="latest", checkpointing_steps=4))
        assert len(read_metrics(tmp_path / "new")) == step
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"no checkpoint in {tmp_path / 'new'}: starting at step 0"
    ]


def test_bf16_keeps_the_weights_in_float32(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path / "no"))
    train(cache, config(tmp_path / "bf16", mixed_precision="bf16"))
    losses = [loss for loss, _, _ in course(tmp_path / "bf16")]
    assert losses != [loss for loss, _, _ in course(tmp_path / "no")]
    assert losses == pytest.approx([loss for loss, _, _ in course(tmp_path / "no")], rel=0.05)
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16" / WEIGHTS["prior"]).values()} == {torch.float32}


def test_fp16_without_a_device_for_it_is_refused(cache: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match="--mixed-precision fp16 cannot be used here"):
        train(cache, config(tmp_path, mixed_precision="fp16"))


def test_the_trained_decoder_is_a_pipeline(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path / "run", "decoder"))
    pipeline = AutoPipelineForText2Image.from_pretrained(tmp_path / "run")
    trained = load_file(tmp_path / "run" / WEIGHTS["decoder"])
    assert all(torch.equal(value, trained[name]) for name, value in pipeline.unet.state_dict().items())


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_run_with_a_checkpoint(
    cache: str, tmp_path: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def report(progress: Progress) -> None:
        if progress.step == 10:
            os.kill(os.getpid(), number)

    with pytest.raises(error) as caught:
        train(cache, config(tmp_path, max_train_steps=40), report=report)
    assert caught.type is KeyboardInterrupt or caught.value.code == 143  # type: ignore[attr-defined]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-11"]


def test_a_loss_that_is_not_finite_ends_the_run(cache: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"at step [0-9]+ the loss is (nan|inf)"):
        train(cache, config(tmp_path, learning_rate=1e20, max_train_steps=30, checkpointing_steps=1))
    good = [entry["step"] for entry in read_metrics(tmp_path)]
    newest = max(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*"))
    assert newest == good[-1] < 30


def test_a_fresh_run_does_not_mix_with_an_earlier_one(cache: str, tmp_path: Path) -> None:
    train(cache, config(tmp_path, checkpointing_steps=2))
    with pytest.raises(RunError, match="holds checkpoint-4 of an earlier run"):
        train(cache, config(tmp_path))


def test_a_resumed_run_keeps_its_settings_and_its_cache(cache: str, build: Callable[..., str], tmp_path: Path) -> None:
    train(cache, config(tmp_path, checkpointing_steps=2))
    with pytest.raises(RunError, match=r"learning_rate: 0\.0001 → 0\.001"):
        train(
            cache,
            config(tmp_path, learning_rate=1e-3, resume_from_checkpoint="latest"),
        )
    with pytest.raises(CacheMismatchError, match="was trained from tables image_embeds-"):
        train(build(stage="prior", dtype="float16"), config(tmp_path, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("stage", "other", "field"), [("decoder", "prior", "latents"), ("prior", "decoder", "text_embeds")]
)
def test_a_cache_without_a_table_is_refused_before_a_network_is_looked_for(
    build: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, other: str, field: str
) -> None:
    monkeypatch.setattr(kcache.training.choice, "find_repository", lambda *_: pytest.fail("looked for"))
    with pytest.raises(CacheIncompleteError, match=f"holds no '{field}'"):
        train(build(stage=other), config(tmp_path, stage))


def test_a_cache_of_other_encoders_is_refused(oracle: Path, cache: str, tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    other = tmp_path / "other"
    other.mkdir()
    for component in (oracle / "prior").iterdir():
        (other / component.name).symlink_to(component)
    (other / "image_encoder").unlink()
    encoder = CLIPVisionModelWithProjection.from_pretrained(oracle / "prior" / "image_encoder")
    encoder.visual_projection.weight.data.mul_(2)
    encoder.save_pretrained(other / "image_encoder")
    with pytest.raises(CacheMismatchError, match=r"image_embeds of .* was made with the image_encoder weights"):
        train(cache, config(tmp_path / "run", pretrained_prior_model_name_or_path=str(other)))


def test_a_network_of_another_width_is_refused(oracle: Path, cache: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for component in (oracle / "prior").iterdir():
        (other / component.name).symlink_to(component)
    (other / "prior").unlink()
    prior = PriorTransformer(num_attention_heads=1, attention_head_dim=8, num_layers=1, embedding_dim=16)
    prior.save_pretrained(other / "prior")
    with pytest.raises(CacheMismatchError, match=r"image_embeds of shape \(32,\); .* wants \(16\)"):
        train(cache, config(tmp_path / "run", pretrained_prior_model_name_or_path=str(other)))
