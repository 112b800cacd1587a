"""Selections: what an expression means, and what is said of one that means nothing."""

import contextlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.errors import CacheMismatchError, ConfigError
from kcache.loader import CacheLoader
from kcache.store.selection import matching_samples

ROWS: list[dict[str, Any]] = [
    {"name": "a.png", "captions": ["a cat", "two cats"], "width": 512, "height": 768},
    {"name": "b.png", "captions": ["a dog"], "width": 1024, "height": 768},
    {"name": "sketch/c.png", "captions": [], "width": 300, "height": 300},
]


def columns() -> dict[str, Any]:
    text = {name: lambda name=name: pa.array([row[name] for row in ROWS]) for name in ("name", "captions")}
    return text | {name: lambda name=name: np.array([row[name] for row in ROWS]) for name in ("width", "height")}


def chosen(expression: str) -> list[int]:
    return matching_samples(expression, columns()).tolist()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("width >= 512", [0, 1]),
        ("512 <= width < 1024", [0]),
        ("width >= 512 and height >= 768 and not width > 600", [0]),
        ("width == 300 or width == 1024", [1, 2]),
        ("not (width == 300 or width == 1024)", [0]),
        ("width > height", [1]),
        ("width in [300, 512.0]", [0, 2]),
        ("width not in (300,)", [0, 1]),
        ("width in []", []),
        ("width > -1", [0, 1, 2]),
        ("width < 100000000000000000000000", [0, 1, 2]),
        ("width > -1e400", [0, 1, 2]),
        ("name == 'b.png'", [1]),
        ("name in {'a.png', 'b.png', 'x'}", [0, 1]),
        ("name < 'b'", [0]),
        ("'sketch/' not in name", [0, 1]),
        ("'cat' in captions", [0]),
        ("'cat' in captions or 'dog' in captions", [0, 1]),
        ("'' in captions", [0, 1]),
        (" width ==\n512 ", [0]),
    ],
)
def test_what_an_expression_chooses(expression: str, expected: list[int]) -> None:
    assert chosen(expression) == expected


@given(low=st.integers(-(2**70), 2**70), high=st.integers(0, 2000), flip=st.booleans())
def test_numbers_are_compared_as_python_compares_them(low: int, high: int, flip: bool) -> None:
    expression = f"{'not ' * flip}({low} < width <= {high} or height != {high})"
    expected = [i for i, row in enumerate(ROWS) if flip != (low < row["width"] <= high or row["height"] != high)]
    assert chosen(expression) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            "width > 1 and widht > 5",
            "'widht' at position 15; expected one of the columns name, captions, width, height",
        ),
        ("width >", "invalid syntax at position"),
        ("", "invalid syntax at position"),
        ("width", "'width' at position 1; expected a comparison of a column"),
        ("width > 'a'", "\"'a'\" at position 9; expected a number"),
        ("name == 5", "'5' at position 9; expected a string in quotes"),
        ("width == True", "'True' at position 10; expected a number"),
        ("captions == 'a cat'", "'captions' at position 1; expected a column of single values"),
        ("name > width", "'width' at position 8; expected a column of the same kind as name"),
        ("5 in captions", "'5' at position 1; expected a string"),
        ("'5' in width", "'width' at position 8; expected a column of text"),
        ("width is 5", "expected ==, !=, <"),
        ("width + 1 > 5", "'width \\+ 1' at position 1; expected the name of a column"),
        ("é > 1", "at position 1"),
        ("name == 'é' and x > 1", "'x' at position 17"),
        ("name == '\\ud800'", "expected a string that can be written in UTF-8"),
        ("'\\ud800' in captions", "expected a string that can be written in UTF-8"),
    ],
)
def test_what_is_not_understood_is_said_with_its_place(expression: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        matching_samples(expression, columns())


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "name.upper() == 'A'",
        "(lambda: width)() > 1",
        "[name for name in name] == 1",
        "width[0] == 1",
        "f'{name}' == 'a'",
        "(width := 5) > 1",
        "width > 1 if width else height",
        "name == b'a'",
        "width == 1j",
        "width == ...",
        "not " * 5000 + "width > 1",
        "(" * 5000,
        "width > 1\0",
        "-" * 100_000 + "1 < width",
        "'\\d' in name.x",
    ],
)
def test_nothing_else_than_comparisons_is_taken(expression: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        matching_samples(expression, columns())


@given(st.text(alphabet="width name'\"<>=!()[]{}.,:0123-+*/\\\n\t éandornotin", max_size=40))
def test_any_text_is_an_expression_or_refused(expression: str) -> None:
    with contextlib.suppress(ConfigError):
        matching_samples(expression, columns())


FIELDS = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("selection") / "cache"
    write_synthetic_cache(path, 40, dim=4, latent_side=2, rows_per_shard=9, captions=3)
    return Cache.open(path)


def test_a_selection_reads_as_its_samples_do(cache: Cache) -> None:
    few = cache.where("'1 of sample 1' in captions")
    numbers = [1, *range(10, 20)]
    assert len(few) == len(numbers)
    assert few.samples["name"].to_pylist() == [f"sample {i}" for i in numbers]
    for caption in range(3):
        found, expected = few.read(range(len(few)), FIELDS, caption), cache.read(numbers, FIELDS, caption)
        assert all((found[name] == expected[name]).all() for name in expected)
    few.make_resident(FIELDS)
    assert (few.read([0, 3], ["latents"])["latents"] == cache.read([1, 12], ["latents"])["latents"]).all()
    assert few.resident_bytes(FIELDS) < cache.resident_bytes(FIELDS)


def test_a_selection_reads_only_what_is_asked_of_a_large_index(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.store.formats.index_files._SOON", 0)
    few = Cache.open(cache.path).select([30, 4, 5]).select([2, 0])
    assert few.unread_bytes(["latents"]) > 0
    assert (few.read([1], ["latents"])["latents"] == cache.read([30], ["latents"])["latents"]).all()
    assert few.unread_bytes(["latents"]) == 0
    assert few.unread_bytes(["image_embeds"]) > 0
    for name, table in (("text_embeds", "text"), ("latents", "latents-16")):
        whole = np.concatenate([few.index[table][[at]] for at in range(few.table_length(name))])
        assert (few.index[table][:] == whole).all()
        assert (few.index[table]["shard"] == whole["shard"]).all()
    assert few.told(0, "name") == "sample 5"


def test_samples_come_in_parts_with_their_numbers(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.store.samples.SAMPLES_PER_TABLE", 7)
    few = cache.select([39, 8, 3, 20, 7])
    for some in (cache, few):
        numbers, names = zip(*((at, part["name"].to_pylist()) for at, part in some.parts(["name"])), strict=True)
        parts = dict(zip(np.concatenate(numbers).tolist(), sum(names, []), strict=True))
        assert [parts[number] for number in range(len(some))] == some.samples["name"].to_pylist()
    assert few.where("'sample 7' == name or name == 'sample 20'").samples["name"].to_pylist() == [
        "sample 20",
        "sample 7",
    ]
    assert few.where("tokens > 0 and n_captions == 3") is few


def test_the_reserved_rows_stay(cache: Cache) -> None:
    everything = cache.read([0], FIELDS, drop_caption=np.array([True]), drop_image=np.array([True]))
    few = cache.select([5, 3]).read([1], FIELDS, drop_caption=np.array([True]), drop_image=np.array([True]))
    for name in set(FIELDS) - {"latents"}:
        assert (few[name] == everything[name]).all()
    assert (few["latents"] == cache.read([3], ["latents"])["latents"]).all()


def test_derived_columns(cache: Cache) -> None:
    offsets = [cache.read(range(40), FIELDS[3:], caption)["text_offsets"] for caption in range(3)]
    longest = np.max([np.diff(bounds) for bounds in offsets], axis=0)
    assert cache.where("tokens <= 20").samples["name"].to_pylist() == [
        f"sample {i}" for i in np.flatnonzero(longest <= 20)
    ]
    assert len(cache.where("n_captions == 3")) == 40
    with pytest.raises(ConfigError, match="holds for none of the 40 samples"):
        cache.where("n_captions == 2")


def test_a_selection_of_a_selection(cache: Cache) -> None:
    twice = cache.select([5, 7, 9]).select([2, 0])
    direct = cache.select([9, 5])
    assert twice.samples["name"].to_pylist() == ["sample 9", "sample 5"]
    assert twice.samples_digest == direct.samples_digest
    with pytest.raises(IndexError, match="cache of 3 samples"):
        cache.select([5, 7, 9]).select([3])
    for wrong in (np.array([False, True, False]), [0.5], ["1"]):
        with pytest.raises(IndexError, match="expected their numbers"):
            cache.select(wrong)


def test_the_digest_says_which_samples_not_in_which_words(cache: Cache) -> None:
    digests = [cache.where(e).samples_digest for e in ("tokens > 20", "not tokens <= 20", "tokens > 21", "tokens > 0")]
    assert digests[0] == digests[1]
    assert len({*digests}) == 3
    assert digests[3] == cache.samples_digest
    assert cache.where("tokens > 20").fingerprint != cache.fingerprint


def test_another_selection_cannot_resume(cache: Cache) -> None:
    state = CacheLoader(cache.where("tokens > 20"), ["latents"], 4).state_dict()
    CacheLoader(cache.where("tokens >= 21"), ["latents"], 4).load_state_dict(state)
    for other in (cache, cache.where("tokens > 21")):
        with pytest.raises(CacheMismatchError, match="not those that the order was begun with"):
            CacheLoader(other, ["latents"], 4).load_state_dict(state)
