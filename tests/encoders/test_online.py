"""The encoders in the loop give what the cache gives, bit for bit: captions, dropped conditions and selections too."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_builds import build

from kcache import Cache
from kcache.config import TrainConfig
from kcache.encoders.decoding import decode_image
from kcache.encoders.frozen import TextEncoder
from kcache.encoders.online import OnlineEncoders
from kcache.errors import CacheMismatchError, ConfigError, RunError, SourceError
from kcache.loader import CacheLoader
from kcache.sources import open_source
from kcache.store.run_directory import read_metrics
from kcache.training.trainer import train

Batches = list[dict[str, torch.Tensor]]

FIELDS = ["image_embeds", "text_embeds", "text_encoder_hidden_states", "latents"]
PICTURES = 7


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with one to three captions each."""
    folder = tmp_path_factory.mktemp("online") / "pictures"
    folder.mkdir()
    for i, path in enumerate(sorted((oracle / "data").glob("img_*.png"))[:PICTURES]):
        shutil.copyfile(path, folder / f"{i}.png")
        captions = [f"caption {c} of picture number {i}" + " and more" * c for c in range(1 + i % 3)]
        (folder / f"{i}.txt").write_text("\n".join(captions))
    return folder


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def cache(request: pytest.FixtureRequest, source: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in both forms of a cache, at two resolutions."""
    folder = tmp_path_factory.mktemp("online") / "cache"
    build(source, folder, oracle, format=request.param, resolution=(64, 32))
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """Five epochs of batches, mapped from a zarr cache, four in ten captions and three in ten images left out."""
    folder = tmp_path_factory.mktemp("expected") / "cache"
    build(source, folder, oracle, format="zarr", resolution=(64, 32))
    return batches(Cache.open(folder, 64), "mmap")


def batches(rows: Cache | OnlineEncoders, residency: str = "auto") -> Batches:
    loader = CacheLoader(rows, FIELDS, 3, seed=5, residency=residency, caption_dropout=0.4, image_dropout=0.3)
    return list(islice(loader.forever(), 5 * PICTURES // 3))


def assert_equal(found: Batches, expected: Batches) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("residency", ["mmap", "ram"])
def test_form_and_residency_do_not_change_batches(cache: Path, expected: Batches, residency: str) -> None:
    assert_equal(batches(Cache.open(cache, 64), residency), expected)


def online(cache: Cache, source: Path) -> OnlineEncoders:
    return OnlineEncoders(cache, open_source(str(source), need_captions=False), FIELDS, torch.device("cpu"))


def test_encoders_in_the_loop_give_the_same_batches(cache: Path, source: Path, expected: Batches) -> None:
    assert_equal(batches(online(Cache.open(cache, 64), source)), expected)


def test_a_selection_is_the_same_online(cache: Path, source: Path) -> None:
    few = Cache.open(cache, 64).where("n_captions > 1 or '3.png' in name")
    assert 0 < len(few) < PICTURES
    assert_equal(batches(online(few, source)), batches(few))


def test_each_resolution_gives_its_latents(cache: Path, source: Path) -> None:
    for side in (32, 64):
        chosen = Cache.open(cache, side)
        rows = chosen.read(range(PICTURES), ["latents"])["latents"]
        assert rows.shape == (PICTURES, 4, side // 8, side // 8)
        again = OnlineEncoders(chosen, open_source(str(source)), ["latents"], torch.device("cpu"))
        assert (again.read(range(PICTURES), ["latents"])["latents"].numpy() == rows).all()


def test_training_from_each_resolution(cache: Path, tmp_path: Path) -> None:
    def run(name: str, *resolution: int) -> None:
        train(
            str(cache),
            TrainConfig(stage="decoder", output_dir=str(tmp_path / name), resolution=resolution, max_train_steps=2),
        )

    run("small", 32)
    run("large", 64)
    small, large = ([entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("small", "large"))
    assert small != large
    with pytest.raises(ConfigError, match="latents at 32, 64 pixels; say which"):
        run("either")


def test_reserved_inputs_are_encoded_once(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    reserved = TextEncoder.reserved
    monkeypatch.setattr(TextEncoder, "reserved", lambda self: calls.append(1) or reserved(self))
    rows = online(Cache.open(cache, 64), source)
    everything = np.ones(2, np.bool_)
    for _ in range(3):
        dropped = rows.read([0, 1], FIELDS, drop_caption=everything, drop_image=everything)
    assert len(calls) == 1
    assert torch.equal(dropped["image_embeds"][0], dropped["image_embeds"][1])


def test_an_image_for_two_encoders_is_decoded_once(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, decoded = online(Cache.open(cache, 64), source), []
    monkeypatch.setattr("kcache.encoders.frozen.decode_image", lambda *given: decoded.append(1) or decode_image(*given))
    rows.read([4, 1, 2], FIELDS)
    assert len(decoded) == 3
    rows.read([4, 1, 2], ["image_embeds"], drop_image=np.array([True, False, True]))
    assert len(decoded) == 4


@pytest.mark.parametrize(("stage", "dropout"), [("prior", "caption_dropout"), ("decoder", "image_dropout")])
def test_training_with_dropout_is_the_same_online(
    cache: Path, source: Path, tmp_path: Path, stage: str, dropout: str
) -> None:
    def losses(name: str, **settings: object) -> list[float]:
        config = TrainConfig(
            stage=stage, output_dir=str(tmp_path / name), resolution=64, train_batch_size=3, max_train_steps=4,
            **settings,  # type: ignore[arg-type]
        )  # fmt: skip
        train(str(cache), config)
        return [entry["loss"] for entry in read_metrics(tmp_path / name)]

    some = {dropout: 0.5, "where": "height >= 1", "noise_draws": 3 if stage == "prior" else 1}
    assert losses("cached", **some) == losses("online", online=str(source), **some)
    assert losses("whole") != losses("cached2", **some)


def test_another_selection_or_dropout_does_not_resume(cache: Path, tmp_path: Path) -> None:
    def run(steps: int, **settings: object) -> None:
        train(
            str(cache),
            TrainConfig(
                stage="prior", output_dir=str(tmp_path), max_train_steps=steps, checkpointing_steps=2,
                resume_from_checkpoint="latest", **settings,  # type: ignore[arg-type]
            ),
        )  # fmt: skip

    run(2, where="n_captions > 1", caption_dropout=0.25)
    with pytest.raises(CacheMismatchError, match=r"was trained on other samples than there are now .*--new-order"):
        run(4, where="n_captions == 1", caption_dropout=0.25)
    with pytest.raises(RunError, match=r"caption_dropout: 0\.25 → 0\.5"):
        run(4, where="n_captions > 1", caption_dropout=0.5)
    run(4, where="not n_captions <= 1", caption_dropout=0.25)
    assert len(read_metrics(tmp_path)) == 4


def test_online_reads_the_columns_that_it_is_told(cache: Path, source: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [path.read_bytes() for path in sorted(source.glob("*.png"))]
    table = pa.table({"picture": images, "text": list(range(PICTURES)), "words": ["unused"] * PICTURES})
    pq.write_table(table, tmp_path / "rows.parquet")
    settings = {
        "stage": "prior",
        "online": str(tmp_path / "rows.parquet"),
        "max_train_steps": 1,
        "image_column": "picture",
    }
    config = TrainConfig(output_dir=str(tmp_path / "run"), caption_column="words", **settings)  # type: ignore[arg-type]
    assert train(str(cache), config).step == 1
    with pytest.raises(SourceError, match="nosuch"):
        train(str(cache), replace(config, output_dir=str(tmp_path / "other"), caption_column="nosuch"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "decoder", "caption_dropout": 0.1}, "--caption-dropout is for the prior"),
        ({"stage": "prior", "image_dropout": 0.1}, "for the prior the image is the target"),
        ({"stage": "prior", "caption_dropout": 1.5}, "--caption-dropout is 1.5; expected a probability"),
        ({"stage": "prior", "caption_dropout": float("nan")}, "expected a probability"),
        ({"stage": "prior", "image_column": "picture"}, "kcache cache-build SOURCE CACHE"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(output_dir="run", **settings)  # type: ignore[arg-type]
