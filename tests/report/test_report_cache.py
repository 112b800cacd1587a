"""The report of a cache: what it says is what the cache holds; and `kcache report`, for both kinds."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image

from kcache.config import AS_FOUND
from kcache.encoders.pixels import movq_pixels
from kcache.errors import CacheCorruptError, ConfigError, ModelError, SourceError
from kcache.report import cache as report_cache
from kcache.report.cache import ReportConfig, cache_sections
from kcache.report.drawn.reconstructions import decoded, originals, psnr
from kcache.report.drawn.shown import SIDE, caption_text
from kcache.report.figures import MAX_SIDE, histogram, picture
from kcache.report.grid import GAP, beside
from kcache.report.page import Figure, Section, Table, Text
from kcache.report.write import write_report
from kcache.store.cache import Cache
from kcache.store.index import open_index
from kcache.store.manifest import Manifest
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.info import describe_cache
from kcache_cli import app as cli

TITLES = [
    "Overview", "Samples", "Captions", "How captions fit", "Kinds of pictures", "Values", "Rejected inputs",
    "Tables and shards",
]  # fmt: skip


def ignore(name: str, done: int, total: int) -> None:
    """Takes reports of progress and does nothing."""


def sections(cache: str | Path, **look: Any) -> dict[str, Section]:
    found = cache_sections(ReportConfig(path=str(cache), **look), ignore)
    assert [section.title for section in found] == TITLES
    return {section.title: section for section in found}


def texts(section: Section) -> str:
    return "\n".join(block.text for block in section.blocks if isinstance(block, Text))


def figures(section: Section) -> list[Figure]:
    return [block for block in section.blocks if isinstance(block, Figure)]


def tables(section: Section) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)]


@pytest.fixture(scope="module")
def whole(cache: str) -> dict[str, Section]:
    """The report of the cache alone."""
    return sections(cache)


def test_it_says_what_cache_info_says(cache: str, whole: dict[str, Section]) -> None:
    about, found = describe_cache(cache), whole
    overview = dict(row for row in tables(found["Overview"])[0].rows)
    assert overview["Samples"] == str(about["samples"])
    assert overview["Form"] == about["format"]
    assert about["fingerprint"].startswith(overview["Fingerprint"])
    assert overview["Encoders of the prior"] == about["models"]["prior"]["name"]
    counted, shards = tables(found["Tables and shards"])
    assert [row[0] for row in counted.rows] == sorted(about["tables"])
    assert [row[1] for row in counted.rows] == [str(table["rows"]) for table in about["tables"].values()]
    assert [row[0] for row in shards.rows] == sorted(about["tables"])
    captions = {row[0]: row[1:] for row in tables(found["Captions"])[0].rows}
    statistics = [about["tokens"][name] for name in ("min", "mean", "p50", "p90", "p99", "max")]
    assert captions["Tokens of a caption"] == [f"{value:g}" for value in statistics]
    assert len(figures(found["Captions"])) == 1
    assert len(figures(found["Values"])) == 3


def test_samples_are_shown_in_writing_where_there_are_no_pictures(cache: str, whole: dict[str, Section]) -> None:
    section = whole["Samples"]
    told = Cache.open(cache).samples.to_pylist()
    (table,) = tables(section)
    assert [row[0] for row in table.rows] == [row["name"] for row in told]
    captions = [[text if len(text) <= 300 else text[:299] + "…" for text in row["captions"]] for row in told]
    assert [row[2] for row in table.rows] == ["\n".join(texts) for texts in captions]
    assert "latents were not decoded (give --pretrained-decoder-model-name-or-path or --source)" in texts(section)


def test_norms_are_those_of_the_rows(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, np.ndarray] = {}

    def keep(title: str, values: np.ndarray, across: str, caption: str) -> Figure:
        drawn[title] = values
        return histogram(title, values, across, caption)

    monkeypatch.setattr(report_cache, "histogram", keep)
    monkeypatch.setattr(report_cache, "ROWS_PER_READ", 3)
    sections(cache)
    opened = Cache.open(cache)
    for title, field in (("image_embeds", "image_embeds"), ("text_embeds", "text_embeds"), ("latents-64", "latents")):
        rows = opened.read(range(len(opened)), [field])[field].astype(np.float64)
        assert drawn[title] == pytest.approx(np.sqrt((rows.reshape(len(rows), -1) ** 2).sum(1)))
    assert drawn["Tokens of a caption"].sum() == describe_cache(cache)["tokens"]["mean"] * len(
        drawn["Tokens of a caption"]
    )


def test_of_a_large_cache_only_some_rows_are_read(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counting(self: Cache, samples: Any, *rest: Any, real: Any = Cache.read, **more: Any) -> Any:
        read.append(len(samples))
        return real(self, samples, *rest, **more)

    monkeypatch.setattr(Cache, "read", counting)
    opened: list[Path] = []

    def opening(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
        opened.append(folder)
        return open_index(folder, manifest)

    monkeypatch.setattr("kcache.store.cache.open_index", opening)
    monkeypatch.setattr("kcache.store.cache.read_samples", lambda *_: pytest.fail("all samples were read at once"))
    monkeypatch.setattr(report_cache, "SAMPLED_ROWS", 4)
    monkeypatch.setattr(report_cache, "SHOWN", 3)
    found = sections(cache)
    assert read == [4, 4, 4]
    assert len(opened) == 1
    assert len(tables(found["Samples"])[0].rows) == 3
    assert "Euclidean norms of 4 of 10 rows" in figures(found["Values"])[0].caption


def test_latents_stand_beside_their_originals(cache: str, oracle: Path) -> None:
    look = {"pretrained_decoder_model_name_or_path": str(oracle / "decoder"), "source": str(oracle / "data")}
    section = sections(cache, **look)["Samples"]
    told = Cache.open(cache).samples.to_pylist()
    *pairs, ratios = figures(section)
    assert [pair.caption.split(",")[0] for pair in pairs] == [row["name"] for row in told]
    assert all("PSNR" in pair.caption for pair in pairs)
    assert ratios.caption == f"Of the {len(told)} samples above."


def test_decoded_latents_are_what_the_pipeline_decodes(cache: str, oracle: Path) -> None:
    opened = Cache.open(cache)
    chosen = np.array([0, 4])
    latents = torch.from_numpy(opened.read(chosen, ["latents"])["latents"])
    movq = VQModel.from_pretrained(oracle / "decoder" / "movq")
    with torch.inference_mode():
        expected = movq.decode(latents, force_not_quantize=True).sample.clamp(-1, 1).numpy()
    made = np.stack(decoded(opened.read(chosen, ["latents"])["latents"], str(oracle / "decoder"), "cpu", ignore))
    assert made == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ModelError, match="movq"):
        decoded(opened.read(chosen, ["latents"])["latents"], str(oracle / "prior"), "cpu", ignore)


def test_originals_are_those_that_were_encoded(cache: str, oracle: Path, tmp_path: Path) -> None:
    opened = Cache.open(cache)
    names = opened.samples["name"].to_pylist()
    source = shutil.copytree(oracle / "data", tmp_path / "data")
    (source / names[1]).unlink()
    shutil.copyfile(source / names[0], source / names[2])
    found = originals(opened, np.array([0, 1, 2]), str(source), AS_FOUND, [(64, 64)] * 3, ignore)
    expected = movq_pixels(Image.open(source / names[0]).convert("RGB"), (64, 64))
    assert isinstance(found[0], np.ndarray)
    assert found[0] == pytest.approx(expected, abs=1e-6)
    assert found[1:] == ["not in the source", "another picture in the source now"]
    shown = sections(cache, source=str(source))["Samples"]
    assert "not in the source" in figures(shown)[1].caption
    with pytest.raises(SourceError):
        sections(cache, source=str(tmp_path / "nothing"))


def test_a_source_without_the_originals_is_refused(
    cache: str, oracle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Cache.open(cache)
    names = opened.samples["name"].to_pylist()[:3]
    shutil.copyfile(oracle / "data" / names[0], tmp_path / names[0])
    shutil.copyfile(oracle / "data" / names[0], tmp_path / names[1])
    originals(opened, np.array([0, 1, 2]), str(tmp_path), AS_FOUND, [(64, 64)] * 3, ignore)
    assert "2 of the 3 samples shown have no original" in caplog.text
    assert "1 are not there, 1 have another picture now" in caplog.text
    with pytest.raises(SourceError, match=rf"none of the 2 samples .* such as {names[1]} \(1 are not there, 1 have"):
        originals(opened, np.array([1, 2]), str(tmp_path), AS_FOUND, [(64, 64)] * 2, ignore)
    caplog.clear()
    originals(opened, np.array([0]), str(tmp_path), AS_FOUND, [(64, 64)], ignore)
    assert caplog.text == ""


def test_signal_to_noise() -> None:
    black, white = np.full((3, 2, 2), -1.0), np.full((3, 2, 2), 1.0)
    assert psnr(black, white) == 0
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 0.02) == pytest.approx(40)  # a hundredth of the range


def test_a_prior_cache_has_no_latents_to_decode(build: Callable[..., str], oracle: Path) -> None:
    cache = build(stage="prior")
    found = sections(cache, pretrained_decoder_model_name_or_path=str(oracle / "decoder"))
    assert "it has none: give --source" in texts(found["Samples"])
    assert [figure.caption for figure in figures(sections(cache, source=str(oracle / "data"))["Samples"])]


def test_a_webdataset_cache_has_the_same_report(cache: str, whole: dict[str, Section], tmp_path: Path) -> None:
    convert_cache(cache, str(tmp_path / "tars"), "webdataset")
    second = sections(tmp_path / "tars")
    for title in ("Samples", "Captions", "Values", "Rejected inputs"):
        assert second[title] == whole[title]


def test_rejected_inputs_are_counted_and_named(cache: str, whole: dict[str, Section], tmp_path: Path) -> None:
    assert texts(whole["Rejected inputs"]) == "No input was rejected."
    folder = shutil.copytree(cache, tmp_path / "cache")
    lines = [{"name": f"<script>{i}", "stage": "decode", "reason": f"because {i % 2}"} for i in range(120)]
    (folder / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counted, *named_and_grouped = report_cache._rejected(folder, 120)
    assert isinstance(counted, Text)
    assert "not in the cache: 120, the first 50 of them by name" in counted.text
    grouped, named = (block for block in named_and_grouped if isinstance(block, Table))
    assert grouped.rows == [["decode", "because 0", "60"], ["decode", "because 1", "60"]]
    assert len(named.rows) == 50
    written = write_report(ReportConfig(path=str(folder), output=str(tmp_path / "report.html")))
    page = Path(written.report).read_text()
    assert "&lt;script&gt;0" in page
    assert "<script" not in page
    assert written.bytes == len(page.encode()) < 5_000_000
    assert write_report(ReportConfig(path=str(folder), output=written.report)) == written
    (folder / "rejected.jsonl").write_text("no JSON\n")
    with pytest.raises(CacheCorruptError, match=r"rejected\.jsonl cannot be read"):
        report_cache._rejected(folder, 120)


def test_long_captions_are_cut(cache: str) -> None:
    text = caption_text({"captions": ["x" * 301, "short"]})
    assert text == "x" * 299 + "…\nshort"
    assert caption_text({"captions": list("abcdefg")}) == "a\nb\nc\nd\ne\nand 2 more"


def test_pictures_fit_the_page() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 2000, 3), dtype=np.uint8)
    shown = picture(Image.fromarray(noise), "noise", 100_000)
    assert len(shown.png) <= 100_000
    wide = picture(Image.new("RGB", (2000, 600)), "plain", 100_000)
    assert int.from_bytes(wide.png[16:20], "big") == MAX_SIDE
    assert beside([Image.new("RGB", (64, 64)), Image.new("RGB", (300, 300))], 152).size == (308, 152)
    assert beside([Image.new("RGB", (96, 64)), Image.new("RGB", (200, 304))], 152).size == (228 + 4 + 100, 152)


@pytest.mark.parametrize("values", [[], [1.0], [3.0] * 5, [1e30, 2e30], [1.0, np.nan, np.inf], list(range(5000))])
def test_any_values_have_a_histogram(values: list[float]) -> None:
    assert histogram("a", np.array(values), "b", "c").png.startswith(b"\x89PNG")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `kcache report` in this process: exit status, stdout and stderr."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kcache", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        captured = capsys.readouterr()
        return exited.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return command


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has just begun."""
    folder = tmp_path / "run"
    folder.mkdir()
    told = {"config": {"stage": "prior"}, "cache": {}, "base": {}, "versions": {}}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "metrics.jsonl").touch()
    return folder


def test_a_cache_is_reported_beside_it(cache: str, run: Any) -> None:
    status, out, err = run(cache)
    report = Path(cache).parent / "cache-report.html"
    assert (status, out) == (0, f"{report}\n")
    assert "norms of text: 10 of 10" in err
    assert report.read_text().startswith("<!DOCTYPE html>")
    report.unlink()


def test_a_run_is_reported_in_it(run_dir: Path, run: Any) -> None:
    status, out, _ = run(run_dir, "--json")
    report = run_dir / "report.html"
    assert status == 0
    assert json.loads(out) == {"report": str(report), "kind": "run", "bytes": report.stat().st_size}
    assert "Nearest pictures" not in report.read_text()
    status, out, _ = run(run_dir, "--neighbours", "--output", run_dir / "other.html")
    assert (status, out) == (0, f"{run_dir / 'other.html'}\n")
    assert "Nearest pictures" in (run_dir / "other.html").read_text()


def test_anything_else_is_refused(tmp_path: Path, run: Any) -> None:
    expected = "expected a run directory (config.json and metrics.jsonl, which training writes) or a finished cache"
    (tmp_path / "config.json").write_text("{}")
    for path, found in (
        (tmp_path, "it holds config.json"),
        (tmp_path / "config.json", "it is a file"),
        (tmp_path / "nothing", "there is nothing at that path"),
    ):
        status, out, err = run(path)
        assert (status, out) == (1, "")
        assert f"neither a run nor a cache: {found}; {expected}" in err


def test_settings_that_do_not_belong_are_refused(cache: str, run_dir: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"path": cache, "neighbours": True}, "--neighbours is for the report of a run"),
        ({"path": str(run_dir), "source": "photos"}, "--source is for the report of a cache"),
        ({"path": cache, "output": str(tmp_path)}, "a folder; expected a file"),
        ({"path": cache, "output": str(run_dir / "config.json")}, "a file that is no report"),
        ({"path": cache, "output": str(tmp_path / "no" / "a.html")}, "is no folder; make it first"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_report(ReportConfig(**settings))  # type: ignore[arg-type]


def test_samples_of_many_shapes_are_shown_at_theirs(bucketed: Path, oracle: Path) -> None:
    look = {"pretrained_decoder_model_name_or_path": str(oracle / "decoder"), "source": str(bucketed / "source")}
    found = cache_sections(ReportConfig(path=str(bucketed / "cache"), **look), ignore)
    assert [section.title for section in found] == [TITLES[0], "Shapes", *TITLES[1:]]
    shapes, samples = found[1], found[2]
    opened = Cache.open(bucketed / "cache", 64, buckets=True)
    parts = {part.shape: part for part in opened.by_shape("latents")}
    counted = {f"{tall} × {wide}": f"{len(part):,}" for (tall, wide), part in parts.items()}
    assert dict(tables(shapes)[0].rows) == counted
    pairs = {figure.caption.split(",")[0]: figure for figure in figures(samples)[:-1]}
    assert len(pairs) == len(opened)
    for (tall, wide), part in parts.items():
        for name in part.samples["name"].to_pylist():
            with Image.open(io.BytesIO(pairs[name].png)) as shown:
                enlarged = wide * (SIDE // tall), tall * (SIDE // tall)
                assert shown.size == (2 * round(enlarged[0] * SIDE / enlarged[1]) + GAP, SIDE)
            assert "PSNR" in pairs[name].caption
