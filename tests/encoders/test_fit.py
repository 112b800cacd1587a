"""What no memory can hold is refused before it begins; where memory runs out all the same, the flags are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_builds import build, copy_pictures, foretold

from kcache import machine
from kcache.config import TrainConfig
from kcache.encoders.fit import workers_for
from kcache.errors import ConfigError, KcacheError, MemoryShortError
from kcache.report.sampling import sample
from kcache.store.cache import Cache


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this a machine with so many megabytes."""

    def have(megabytes: int) -> None:
        (tmp_path / "proc").mkdir(exist_ok=True)
        lines = f"MemTotal: {megabytes * 1000} kB\nMemAvailable: {megabytes * 1000} kB\nSwapTotal: 0 kB\n"
        (tmp_path / "proc" / "meminfo").write_text(lines)
        monkeypatch.setattr(machine, "ROOT", tmp_path)

    return have


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resolution": (65536,)}, r"latents-65536 in batches of 4×3×65536×65536: that takes at least 20[0-9]\.\d GB"),
        ({"batch_size": 100_000}, r"image_embeds in batches of 100000×.* can have 2\.0 GB; give a smaller --batch"),
        ({"batch_size": 1, "resolution": (8192,)}, r"latents-8192 .* or a smaller --resolution$"),
    ],
    ids=str,
)  # fmt: skip
def test_a_build_that_cannot_fit_is_refused_before_it_begins(
    settings: dict[str, Any], said: str, memory: Callable[[int], None], oracle: Path, tmp_path: Path
) -> None:
    memory(2000)
    source = copy_pictures(oracle, tmp_path / "pictures", 2)
    for begin in (build, foretold):
        with pytest.raises(ConfigError, match=said):
            begin(source, tmp_path / "cache", oracle, **settings)
    assert not list(tmp_path.glob("cache/*/*"))


def test_a_shard_is_as_large_as_its_rows_and_no_larger(
    memory: Callable[[int], None], oracle: Path, tmp_path: Path
) -> None:
    memory(2000)
    source = copy_pictures(oracle, tmp_path / "pictures", 2)
    build(source, tmp_path / "cache", oracle, rows_per_shard=1_000_000_000)


def test_decoders_are_no_more_than_what_they_decode_fits(
    cache: str, memory: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Cache.open(cache).recipes["latents-64"]  # 49,152 bytes a picture
    memory(1000)
    assert workers_for(recipe, 10_000, 5) == 5
    assert workers_for(recipe, 10_000, 1_000_000) == 10_000
    memory(1)
    assert workers_for(recipe, 10_000, 1_000_000) == 1_024_000 // 2 // 49_152


def failing(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


def test_a_build_names_its_flags(oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.encoders.frozen.TextEncoder.encode", failing)
    with pytest.raises(
        MemoryShortError, match=r"^memory ran out while encoding text in batches of 4 \(Def.*--batch-size"
    ):
        build(copy_pictures(oracle, tmp_path / "pictures", 2), tmp_path / "cache", oracle)


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_names_its_flags_and_what_is_kept(
    step: int, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kcache.training.trainer as trainer

    take, taken = trainer.take_step, []

    def take_step(*given: Any) -> Any:
        taken.append(given)
        return failing() if len(taken) == step else take(*given)

    monkeypatch.setattr(trainer, "take_step", take_step)
    settings: dict[str, Any] = {"stage": "decoder", "output_dir": str(tmp_path / "run"), "report_to": "none"}
    config = TrainConfig(**settings, train_batch_size=4, checkpointing_steps=2, max_train_steps=4)
    with pytest.raises(MemoryShortError) as caught:
        trainer.train(cache, config)
    said = str(caught.value)
    assert (
        "in batches of 4 (DefaultCPUAllocator: can't allocate memory); take less by --train-batch-size 2 with " in said
    )
    assert "--gradient-checkpointing, --mixed-precision bf16, --lora-rank 16, " in said
    kept = f"{tmp_path}/run/checkpoint-2 is kept: --resume-from-checkpoint latest goes on from it"
    assert said.endswith(kept if step > 2 else "no checkpoint was saved")
    assert (tmp_path / "run" / "checkpoint-2").is_dir() == (step > 2)


def test_a_batch_that_cannot_fit_is_refused_before_it_begins(
    cache: str, memory: Callable[[int], None], tmp_path: Path
) -> None:
    import kcache.training.trainer as trainer

    memory(2000)
    for stage in ("prior", "decoder"):
        config = TrainConfig(stage=stage, output_dir=str(tmp_path / stage), train_batch_size=100_000_000)  # type: ignore[arg-type]
        with pytest.raises(
            ConfigError, match=r"--train-batch-size 100000000: that takes at least .* give a smaller one"
        ):
            trainer.train(cache, config)
        assert not (tmp_path / stage).exists()


def test_a_picture_that_cannot_fit_is_refused_and_one_that_does_not_names_its_flags(
    memory: Callable[[int], None], oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"prior": str(oracle / "prior"), "decoder": str(oracle / "decoder"), "device": "cpu"}
    memory(2000)
    with pytest.raises(
        ConfigError, match=r"a picture of 65536×65536 pixels: that takes at least .* --height and --width"
    ):
        sample(["a fox"], height=65536, width=65536, **given)
    monkeypatch.setattr("kcache.report.sampling.draw_embeds", failing)
    with pytest.raises(
        KcacheError, match=r"memory ran out while drawing 64×64 pixels on cpu \(.*\); give a smaller --h"
    ):
        sample(["a fox"], height=64, width=64, **given)


def test_a_device_is_asked_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = type("Properties", (), {"total_memory": 80_000_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    machine.check_fits("it", 79_000_000_000, "take less", "cuda:0")
    with pytest.raises(
        ConfigError, match=r"it: that takes at least 81\.0 GB of memory, cuda:0 can have 80\.0 GB; take"
    ):
        machine.check_fits("it", 81_000_000_000, "take less", "cuda:0")
