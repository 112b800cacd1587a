"""What of the inputs is not in a cache as it was given is counted, and said by the build, cache-info and the report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_builds import build, copy_pictures, digests, encoded, foretold

from kcache import Cache
from kcache.encoders.frozen import load_tokenizer
from kcache.encoders.repositories import find_repository
from kcache.report.cache import ReportConfig, cache_sections
from kcache.store.samples import read_cut
from kcache.tally import Tally
from kcache.upkeep.convert import convert_cache
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.info import describe_cache
from kcache.upkeep.merge import merge_caches

pytestmark = pytest.mark.usefixtures("form")


def test_each_count_has_a_sentence_and_none_for_nothing() -> None:
    assert Tally(captions=3, samples=3, pictures_small={64: 0}).sentences == []
    assert Tally(
        captions=10, captions_empty=3, captions_cut=1, tokens_cut=139, captions_full=2, longest=77, samples=10,
        samples_alike=1, pictures_small={64: 0, 768: 4},
    ).sentences == [
        "1 caption is longer than 77 tokens: 139 tokens of it were not seen",
        "2 captions fill all 77 tokens: how much more there was is not known; building again counts it",
        "3 of 10 captions are empty: they train without a text",
        "1 of 10 samples has the picture of one before",
        "4 of 10 pictures are smaller than 768 pixels, and scaled up",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def built(form: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("losses")
    source = copy_pictures(oracle, folder / "pictures", 5)
    (source / "img_00.txt").write_text("a fox " * 100)
    (source / "img_01.txt").write_text("")
    (source / "img_02.txt").write_text("a fox " * 100)  # the same words: one caption to the encoder
    shutil.copyfile(source / "img_00.png", source / "img_03.png")
    with Image.open(source / "img_04.png") as picture:
        picture.resize((40, 80)).save(source / "img_04.png")
    build(source, folder / "cache", oracle)
    return source, folder / "cache"


def test_losses_are_counted_and_said_alike_everywhere(built: tuple[Path, Path], oracle: Path, tmp_path: Path) -> None:
    source, cache = Path(shutil.copytree(built[0], tmp_path / "s")), Path(shutil.copytree(built[1], tmp_path / "c"))
    tokenizer = load_tokenizer(find_repository(str(oracle / "prior"), None, ("tokenizer",)))
    longest = Cache.open(cache).recipes["text"].batch_shape[1]
    more = len(tokenizer("a fox " * 100, verbose=False)["input_ids"]) - longest
    about = describe_cache(cache)["losses"]
    counted = {name: about[name] for name in ("captions_cut", "tokens_cut", "captions_full", "captions_empty")}
    assert counted == {"captions_cut": 1, "tokens_cut": more, "captions_full": 0, "captions_empty": 1}
    assert (about["samples_alike"], about["pictures_small"]["64"]) == (1, 1)
    assert about["sentences"][0] == f"1 caption is longer than {longest} tokens: {more} tokens of it were not seen"
    before = digests(cache)
    assert list(build(source, cache, oracle).losses) == about["sentences"]
    assert digests(cache) == before
    page = json.dumps([str(section) for section in cache_sections(ReportConfig(path=str(cache)), lambda *_: None)])
    assert all(sentence in page for sentence in about["sentences"])


def test_what_was_counted_goes_along(built: tuple[Path, Path], form: str, tmp_path: Path) -> None:
    expected = describe_cache(built[1])["losses"]
    cache = Path(shutil.copytree(built[1], tmp_path / "cache"))
    convert_cache(cache, tmp_path / "converted", {"zarr": "webdataset", "webdataset": "zarr"}[form])
    merge_caches(tmp_path / "merged", [cache])
    collect_garbage(cache, compact=True)
    for name in ("converted", "merged", "cache"):
        assert describe_cache(tmp_path / name)["losses"] == expected


def test_a_cache_of_before_counts_when_it_is_built_again(
    built: tuple[Path, Path], oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = Path(shutil.copytree(built[0], tmp_path / "s")), Path(shutil.copytree(built[1], tmp_path / "c"))
    with monkeypatch.context() as patch:
        patch.setattr("kcache.build.finish._tokens_cut", lambda *_: {})
        build(source, cache, oracle)
    about = describe_cache(cache)["losses"]
    assert (about["captions_full"], about["captions_cut"]) == (1, 0)
    assert encoded(build(source, cache, oracle)) == {}
    assert digests(cache) == digests(built[1])
    assert len(read_cut(cache, Cache.open(cache).manifest)) == 1


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (
            {"pillow": "9.0.0"},
            r"1 input was rejected by another decoder \(pillow 9.0.0, this is .*\): --retry-rejected",
        ),
        ({"formats": "JPEG,PNG"}, r"1 input was rejected by another decoder \(which read no .*WEBP.*\): --retry"),
        ({"kcache": "0.0.1"}, r"1 input was .*\(kcache 0.0.1, this is .*\)"),
        ({"formats": ""}, r"1 input was rejected by another decoder \(one of an earlier kcache\)"),  # not on record
        ({}, None),
    ],
)
def test_verdicts_of_another_decoder_are_told(
    built: tuple[Path, Path], oracle: Path, tmp_path: Path, then: dict[str, str], said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import re

    from kcache.encoders.decoding import decoder_facts

    source, cache = Path(shutil.copytree(built[0], tmp_path / "s")), Path(shutil.copytree(built[1], tmp_path / "c"))
    (source / "img_04.png").write_bytes(b"of a format that only another Pillow reads")
    facts = decoder_facts()
    monkeypatch.setattr(
        "kcache.encoders.pretrained.decoder_facts",
        lambda: {name: said for name, said in (facts | then).items() if said},
    )
    build(source, cache, oracle)
    for notes in (build(source, cache, oracle).notes, foretold(source, cache, oracle).notes):
        told = [note for note in notes if "another decoder" in note]
        assert len(told) == (said is not None)
        assert said is None or re.match(said, told[0])
    monkeypatch.setattr("kcache.encoders.pretrained.decoder_facts", lambda: facts)
    build(source, cache, oracle, retry_rejected=True)
    assert not [note for note in build(source, cache, oracle).notes if "another decoder" in note]


def test_pictures_that_a_higher_limit_lets_in_are_told(oracle: Path, tmp_path: Path) -> None:
    source = copy_pictures(oracle, tmp_path / "s", 4)
    for number, side in ((1, 250), (2, 300)):
        Image.new("RGB", (side, side)).save(source / f"img_{number:02d}.png")
    (source / "img_03.png").write_bytes(b"no picture")
    build(source, tmp_path / "c", oracle, max_pixels=62_499, stage="decoder")

    def told(**settings: Any) -> list[str]:
        result = build(source, tmp_path / "c", oracle, stage="decoder", **settings)
        return [note for note in result.notes if "--max-pixels" in note]

    assert told(max_pixels=62_499) == told(max_pixels=100) == told(max_pixels=62_500, retry_rejected=True) == []
    assert told(max_pixels=90_000) == [
        "1 input was rejected by another decoder (--max-pixels 62,500, this is 90,000): --retry-rejected tries it again"
    ]
    assert told(max_pixels=80_000) == []
