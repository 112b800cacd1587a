"""What the report says of a cache by its embeddings: the best and the worst pairs, and a picture of each kind."""

import io
from pathlib import Path

import numpy as np
import pytest
from measuring.synthetic import write_synthetic_cache
from PIL import Image

from kcache.report.cache import ReportConfig
from kcache.report.drawn.shown import SIDE
from kcache.report.likeness import sections
from kcache.report.likeness.sections import SHOWN, STRIP, likeness_sections, sampled
from kcache.report.page import Figure, Section, Table
from kcache.store.cache import Cache
from kcache.store.likeness.cosines import caption_cosines


def ignore(name: str, done: int, total: int) -> None:
    """Takes reports of progress and does nothing."""


def looked(cache: str | Path, **look: str) -> list[Section]:
    return likeness_sections(Cache.open(cache), ReportConfig(path=str(cache), **look), ignore)  # type: ignore[arg-type]


def tables(section: Section) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)]


def figures(section: Section) -> list[Figure]:
    return [block for block in section.blocks if isinstance(block, Figure)]


def test_pairs_and_kinds_in_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic_cache(tmp_path / "cache", 100, dim=6, tables=("image_embeds", "text"), captions=2)
    monkeypatch.setattr(sections, "SAMPLED", 40)
    monkeypatch.setattr(sections, "RUN", 10)
    monkeypatch.setattr(sections, "CLUSTERS", 3)
    numbers = sampled(100)
    assert numbers.tolist() == [*range(10), *range(30, 40), *range(60, 70), *range(90, 100)]
    captions, kinds = looked(tmp_path / "cache")
    cosines = caption_cosines(Cache.open(tmp_path / "cache"))[numbers]
    order = np.argsort(cosines, kind="stable")
    for table, chosen in zip(tables(captions), (order[:SHOWN], order[::-1][:SHOWN]), strict=True):
        assert [row[:2] for row in table.rows] == [[f"{cosines[i]:.3f}", f"sample {numbers[i]}"] for i in chosen]
    assert "40 of 100, evenly spread, samples" in figures(captions)[0].caption
    [sheet] = tables(kinds)
    shares = [float(row[0].removesuffix("%")) for row in sheet.rows]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert shares == sorted(shares, reverse=True)
    names = [line.split(":")[0] for row in sheet.rows for line in row[2].splitlines()]
    assert len(names) == len(set(names)) == 3 * SHOWN
    assert {int(name.split()[1]) for name in names} <= set(numbers.tolist())


def test_pairs_and_kinds_in_pictures(cache: str, oracle: Path) -> None:
    captions, kinds = looked(cache, source=str(oracle / "data"))
    pairs, cosines = figures(captions)[1:], caption_cosines(Cache.open(cache))
    assert len(pairs) == 2 * SHOWN
    assert pairs[0].caption.startswith(f"{cosines.min():.3f}, ")
    assert pairs[SHOWN].caption.startswith(f"{cosines.max():.3f}, ")
    assert Image.open(io.BytesIO(pairs[0].png)).height == SIDE
    strips = figures(kinds)
    assert strips
    assert all(Image.open(io.BytesIO(strip.png)).height == STRIP for strip in strips)
    decoded, _ = looked(cache, pretrained_decoder_model_name_or_path=str(oracle / "decoder"))
    assert [figure.caption for figure in figures(decoded)[1:]] == [figure.caption for figure in pairs]
    assert figures(decoded)[1].png != pairs[0].png


def test_a_cache_without_texts_or_samples_has_less_to_show(tmp_path: Path) -> None:
    write_synthetic_cache(tmp_path / "decoder", 3, dim=6, latent_side=2, tables=("image_embeds", "latents"))
    assert [section.title for section in looked(tmp_path / "decoder")] == ["Kinds of pictures"]
    write_synthetic_cache(tmp_path / "none", 0, dim=6, tables=("image_embeds", "text"))
    assert looked(tmp_path / "none") == []
