"""Who leaves a cache when it is built again: counted, named, and most of them only when that is asked for."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_builds import build, copy_pictures, digests, encoded, foretold

from kcache import Cache
from kcache.build.departures import Leaving, kept_beyond, leaving, united
from kcache.errors import CacheMismatchError, ConfigError, SourceError
from kcache.store.digests import caption_key
from kcache.store.samples import Refusal, Sample
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.repair import repair_cache

pytestmark = pytest.mark.usefixtures("form")


def samples(*told: str) -> list[Sample]:
    """Samples told as NAME:PICTURE:CAPTION."""
    parts = [text.split(":") for text in told]
    return [
        Sample(name=name, image_key=caption_key(picture), captions=(caption,), caption_keys=(caption_key(caption),))
        for name, picture, caption in parts
    ]


HAD = samples("a:A:1", "b:B:2", "c:C:3", "c2:C:3")


@pytest.mark.parametrize(
    ("offered", "refused", "expected"),
    [
        (("a:A:1", "b:B:2", "c:C:3", "c2:C:3"), (), {}),
        (("a:A:9", "b:B:9", "c:C:9", "c2:C:9"), (), {}),  # captions only
        (("x:A:1", "y:B:2", "z:C:3", "w:C:3"), (), {}),  # renamed
        (("a:A:1", "b:B:2", "c:C:3"), (), {"gone": ("c2",)}),  # the same picture, once less
        (("b:B:2", "z:C:3", "w:C:3"), (), {"gone": ("a",)}),
        (("a:X:1", "b:B:2", "c:C:3", "c2:C:3"), (), {"changed": ("a",)}),
        (("b:B:2", "c:C:3", "c2:C:3"), ("a",), {"refused": ("a",)}),
        (("a:B:2", "c:C:3", "c2:C:3"), (), {"gone": ("a",)}),  # its name went to a picture that was there
        ((), (), {"gone": ("a", "b", "c", "c2")}),
    ],
)
def test_who_leaves_is_told_by_picture(offered: tuple[str, ...], refused: tuple[str, ...], expected: dict) -> None:
    refusals = [Refusal(name=name, stage="source", reason="no captions") for name in refused]
    assert leaving(HAD, samples(*offered), refusals) == Leaving(had=4, **expected)


@pytest.mark.parametrize(
    ("looked_at", "stay", "names"),
    [
        (("b:B:2", "a:A:1"), "c c2", "a b c c2"),  # nothing new: the old order
        (("n:N:1", "a:A:1"), "b c c2", "n a b c c2"),
        (("a:X:1",), "b c c2", "a b c c2"),  # another picture under the name takes the old one's place
        (("a:A:7",), "b c c2", "a b c c2"),
        (("b:C:3",), "a b c2", "b a b c2"),  # of two sources: no newer picture of b
    ],
)
def test_what_lies_beyond_the_first_samples_stays(looked_at: tuple[str, ...], stay: str, names: str) -> None:
    assert [sample.name for sample in kept_beyond(HAD, samples(*looked_at))] == stay.split()
    assert [sample.name for sample in united(HAD, samples(*looked_at))] == names.split()


SAMPLES = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from("ABCD"), st.sampled_from("12")).map(":".join), max_size=7
).map(lambda told: samples(*told))


@given(had=SAMPLES, offered=SAMPLES, refused=st.sets(st.sampled_from("abcde")))
def test_who_leaves_and_stays_is_told_one_by_one(had: list[Sample], offered: list[Sample], refused: set[str]) -> None:
    same = {(s.name, s.image_key) for s in offered}
    room = Counter(s.image_key for s in offered)
    room.subtract(s.image_key for s in had if (s.name, s.image_key) in same)
    absent = []
    for s in had:
        if (s.name, s.image_key) not in same:
            room[s.image_key] -= 1
            absent += [s] if room[s.image_key] < 0 else []
    new = {s.name for s in offered if s.image_key not in {s.image_key for s in had}}
    found = leaving(had, offered, [Refusal(name=name, stage="source", reason="") for name in refused])
    assert (found.had, found.changed) == (len(had), tuple(s.name for s in absent if s.name in new))
    assert found.gone == tuple(s.name for s in absent if s.name not in new | refused)
    assert found.refused == tuple(s.name for s in absent if s.name in refused - new)
    stay = [s for s in absent if s.name not in new]
    assert list(kept_beyond(had, offered)) == stay
    together = [*offered, *stay]
    in_order = len(set(map(repr, together))) == len(together) and sorted(map(repr, together)) == sorted(map(repr, had))
    assert list(united(had, offered)) == (had if in_order else together)


def test_the_words_name_counts_and_examples() -> None:
    assert Leaving(had=8, gone=("a", "b", "c", "d", "e")).text == (
        "5 of 8 samples leave the cache: they are not in this source any more (a, b, c, …)"
    )
    assert Leaving(had=4, changed=("a",)).text == "1 of 4 samples leaves the cache: it is another picture now (a)"
    assert Leaving(had=8, gone=("a",), refused=("b", "c")).text == (
        "3 of 8 samples leave the cache: 1 is not in this source any more (a), 2 are refused now (b, c)"
    )
    assert [Leaving(had=had, gone=("a", "b")).most for had in (3, 4)] == [True, False]


@pytest.fixture(scope="module")
def built(form: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("departures")
    source = copy_pictures(oracle, folder / "pictures")
    (source / "img_05.png").write_bytes(b"no picture")
    build(source, folder / "cache", oracle)
    return source, folder / "cache"


@pytest.fixture
def copies(built: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    source, cache = (Path(shutil.copytree(path, tmp_path / path.name)) for path in built)
    return source, cache


def remove(source: Path, *numbers: int) -> None:
    for number in numbers:
        for path in source.glob(f"img_0{number}.*"):
            path.unlink()


def half_copied(source: Path, oracle: Path) -> None:
    remove(source, 0, 1, 2)


def another_source(source: Path, oracle: Path) -> None:
    for number, path in enumerate(sorted((oracle / "data").glob("img_*.png"))[6:]):
        shutil.copyfile(path, source / f"img_0{number}.png")


def captions_lost(source: Path, oracle: Path) -> None:
    for number in (0, 1, 2):
        (source / f"img_0{number}.txt").unlink()


@pytest.mark.parametrize("accident", [half_copied, another_source, captions_lost])
def test_most_of_a_cache_leave_only_when_asked(
    copies: tuple[Path, Path], oracle: Path, accident: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = copies
    accident(source, oracle)
    before = digests(cache)
    with monkeypatch.context() as patch:
        patch.setattr("kcache.encoders.frozen.load_encoder", lambda *_: pytest.fail("an encoder was loaded"))
        with pytest.raises(CacheMismatchError, match=r"[34] of 5 samples leave .*--replace .*cache-merge") as refused:
            build(source, cache, oracle)
    assert digests(cache) == before
    assert "\n" not in str(refused.value)
    assert len(foretold(source, cache, oracle).leaving) == len(build(source, cache, oracle, replace=True).leaving) >= 3


def test_some_leave_and_are_counted(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    remove(source, 0, 1)
    planned, result = foretold(source, cache, oracle), build(source, cache, oracle)
    assert planned.leaving == result.leaving == Leaving(had=5, gone=("img_00.png", "img_01.png"))
    [note] = [note for note in result.notes if "leave" in note]
    assert note.startswith("2 of 5 samples leave the cache: they are not in this source any more (img_00.png, img_01")
    assert note in planned.notes
    assert encoded(result) == {}


def test_the_first_samples_remove_nothing(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    before = digests(cache)
    assert encoded(build(source, cache, oracle, max_train_samples=2)) == {}
    assert digests(cache) == before
    shutil.copyfile(oracle / "data" / "img_15.png", source / "img_00.png")
    remove(source, 3)
    result = build(source, cache, oracle, max_train_samples=2)
    assert (result.samples, result.leaving.changed, result.leaving.gone) == (5, ("img_00.png",), ())
    assert [f"img_0{number}.png" for number in range(5)] == Cache.open(cache).samples["name"].to_pylist()


def test_rows_that_only_the_rest_of_a_source_has_are_not_begun_with(copies: tuple[Path, Path], oracle: Path) -> None:
    with pytest.raises(ConfigError, match=r"of the 3 samples of .* beyond these, .* missing in latents-32; .* without"):
        build(*copies, oracle, max_train_samples=2, resolution=(32,))


def test_a_list_that_cannot_be_read_is_no_reason_to_remove(copies: tuple[Path, Path], oracle: Path) -> None:
    source, cache = copies
    next(cache.glob("samples-*.parquet")).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="which samples stay beyond --max-train-samples is not known"):
        build(source, cache, oracle, max_train_samples=2)
    notes = build(source, cache, oracle).notes
    assert any(note.startswith("whether samples leave the cache is not known") for note in notes)


def test_a_merged_cache_keeps_what_another_source_gave_it(
    copies: tuple[Path, Path], oracle: Path, tmp_path: Path
) -> None:
    source, cache = copies
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(oracle / "data" / "img_15.png", other / "img_00.png")
    (other / "img_00.txt").write_text("another picture of that name")
    build(other, tmp_path / "one", oracle)
    merge_caches(tmp_path / "merged", [cache, tmp_path / "one"])
    assert len(foretold(source, tmp_path / "merged", oracle).leaving) == 1
    assert build(source, tmp_path / "merged", oracle, max_train_samples=1).samples == 6


def test_a_repair_removes_nobody(copies: tuple[Path, Path]) -> None:
    source, cache = copies
    remove(source, 0, 1, 2)
    next(cache.glob("samples-*.parquet")).write_bytes(b"damaged")
    next(cache.glob("index-*/captions.npy")).write_bytes(b"damaged")
    with pytest.raises(Exception, match="does not offer exactly those samples"):
        repair_cache(str(source), cache)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_build_without_a_sample_is_refused_with_its_reasons(
    copies: tuple[Path, Path], oracle: Path, tmp_path: Path, earlier: bool
) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(3):
        (pages / f"{number}.jpg").write_bytes(b"<html>404</html>" + b" " * number)
        (pages / f"{number}.txt").write_text("a fox")
    cache = copies[1] if earlier else tmp_path / "new"
    before = digests(cache) if earlier else {}
    for _ in range(2):
        with pytest.raises(SourceError, match=r"all 3 inputs were rejected \(3 × decode: .*, such as 0.jpg\)"):
            build(pages, cache, oracle, replace=True)
    assert (cache / "manifest.json").exists() == earlier
    assert before.items() <= digests(cache).items()
    assert (cache / "rejected.jsonl").read_text().count("\n") == (1 if earlier else 3)
