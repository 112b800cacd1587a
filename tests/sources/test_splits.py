"""A dataset has the same rows by whatever way it is named: its splits are those that `datasets` finds."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import get_data_patterns, resolve_pattern
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.config import SourceConfig
from kcache.errors import SourceError
from kcache.sources import Source, open_source
from kcache.sources.splits import declared_rule, divided, find_splits

WORDS = [
    "train",
    "test",
    "val",
    "dev",
    "valid",
    "evaluation",
    "training",
    "tests",
    "Train",
    "a",
    "0000",
    "__x",
    "data",
]
NAMES = st.lists(st.sampled_from([*WORDS, "-", "_", ".", " ", "-00000-of-00001"]), min_size=1, max_size=3).map("".join)
PATHS = st.builds(
    lambda folders, name: "/".join([*folders, name + ".parquet"]),
    st.lists(NAMES, max_size=2),
    NAMES,
).filter(lambda path: not any(part.startswith(".") or part.endswith(" ") for part in path.split("/")))


@settings(max_examples=60, deadline=None)
@given(paths=st.sets(PATHS, min_size=1, max_size=5))
def test_splits_are_those_that_datasets_finds(paths: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("splits")
    for path in paths:
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        except OSError:  # a file and a folder of one name
            continue
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet") if path.is_file()]
    found = find_splits(there)
    try:
        patterns = get_data_patterns(str(folder))
        expected = {
            str(split): {
                Path(path).relative_to(folder).as_posix() for each in of for path in _resolved(each, str(folder))
            }
            for split, of in patterns.items()
        }
    # A name that can be no split's, or nothing but what is not looked at; on an empty name it stumbles itself.
    except (ValueError, FileNotFoundError, AssertionError):
        return
    finally:
        shutil.rmtree(folder)
    if found is None:
        assert expected.keys() == {"train"}
    else:
        assert {split: set(files) for split, files in found.files.items()} == expected
        assert set(found.spare) == set(there) - set[str]().union(*expected.values())


def _resolved(pattern: str, folder: str) -> list[str]:
    try:
        return resolve_pattern(pattern, folder)
    except FileNotFoundError:
        return []


def offered(source: Source) -> list[str]:
    return [caption for i in range(len(source)) for caption in source.captions(i)]


def table(*texts: str) -> pa.Table:
    return pa.table({"image": [text.encode() for text in texts], "text": list(texts)})


def files(folder: Path, contents: dict[str, Any]) -> str:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


PARQUET = {
    "sharded": "data/{}-00000-of-00001.parquet",
    "folders": "{}/0000.parquet",
    "converted": "default/{}/0000.parquet",
    "hashed": "data/{}-00000-of-00001-0123456789abcdef.parquet",
    "files": "{}.parquet",
    "words": "my_{} set.parquet",
}


@pytest.mark.parametrize("layout", PARQUET)
def test_a_copy_of_a_dataset_is_its_split_train_and_says_what_is_left_out(tmp_path: Path, layout: str) -> None:
    parts = {"train": table("a", "b", "c"), "test": table("t", "u"), "validation": table("v")}
    place = files(tmp_path, {PARQUET[layout].format(name): rows for name, rows in parts.items()})
    source = open_source(place)
    assert offered(source) == ["a", "b", "c"]
    assert not source.refused
    assert source.description.endswith("; split train; left out: validation (1 row), test (2 rows): --split")
    assert offered(open_source(place, SourceConfig(split="test"))) == ["t", "u"]
    with pytest.raises(SourceError, match=r"no split 'dev'; found train, validation, test; .*--split train"):
        open_source(place, SourceConfig(split="dev"))


def save_all(folder: Path) -> str:
    rows = {name: datasets.Dataset(table(*texts)) for name, texts in {"train": "ab", "test": "tuv"}.items()}
    datasets.DatasetDict(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


def tars(folder: Path) -> str:
    loose = Path(pairs(folder / "loose"))
    for split in ("train", "test"):
        with tarfile.open(folder / f"pictures-{split}-0000.tar", "w") as tar:
            for path in sorted((loose / split).iterdir()):
                tar.add(path, path.name)
    shutil.rmtree(loose)
    return str(folder)


def pairs(folder: Path) -> str:
    return files(
        folder,
        {
            f"{split}/{text}.{end}": text
            for split, texts in {"train": "ab", "test": "tuv"}.items()
            for text in texts
            for end in ("jpg", "txt")
        },
    )


def imagefolder(folder: Path) -> str:
    rows = "file_name,text\n" + "".join(
        f"{split}/{text}.jpg,{text}\n" for split, texts in {"train": "ab", "test": "tuv"}.items() for text in texts
    )
    pictures = {f"train/{text}.jpg": text for text in "ab"} | {f"test/{text}.jpg": text for text in "tuv"}
    return files(folder, pictures | {"metadata.csv": rows})


@pytest.mark.parametrize("make", [save_all, tars, pairs, imagefolder])
def test_each_kind_of_source_takes_one_split(tmp_path: Path, make: Callable[[Path], str]) -> None:
    place = make(tmp_path)
    source = open_source(place)
    assert offered(source) == ["a", "b"]
    assert not source.refused
    assert "split train; left out: test (" in source.description
    assert offered(open_source(place, SourceConfig(split="test"))) == ["t", "u", "v"]
    with pytest.raises(SourceError, match="no split 'val'; found train, test"):
        open_source(place, SourceConfig(split="val"))


def test_a_lone_split_that_is_not_train_is_asked_for(tmp_path: Path) -> None:
    place = files(tmp_path, {"test.parquet": table("a")})
    with pytest.raises(SourceError, match=r"no split 'train'; found test; .*--split test"):
        open_source(place)
    assert offered(open_source(place, SourceConfig(split="test"))) == ["a"]
    assert offered(open_source(f"{place}/test.parquet")) == ["a"]  # which names it


def test_what_is_in_no_split_is_named(tmp_path: Path) -> None:
    place = files(tmp_path, {"train.parquet": table("a"), "other.parquet": table("x")})
    source = open_source(place)
    assert [(refusal.name, refusal.reason) for refusal in source.refused] == [
        ("other.parquet", "in no split, beside files that are in train")
    ]
    assert source.description.endswith("split train, the only one")


@pytest.mark.parametrize(
    "names",
    [
        ["ships/a", "train/b", "cars/c"],  # a folder of trains is no split of the ships
        ["train at night", "test", "c"],
        ["test-1", "test-2"],
        ["a", "dev", "train"],
    ],
)
def test_pictures_of_trains_are_no_split(tmp_path: Path, names: list[str]) -> None:
    place = files(tmp_path, {f"{name}.{end}": name for name in names for end in ("jpg", "txt")})
    source = open_source(place)
    assert offered(source) == sorted(names)
    assert ("--split train" in source.description) == any(name.startswith("train/") for name in names)
    if "train/b" in names:
        assert offered(open_source(place, SourceConfig(split="train"))) == ["train/b"]


@pytest.mark.parametrize("given", ["one.parquet", "", "saved"])
def test_a_split_of_what_has_none_is_refused(tmp_path: Path, given: str) -> None:
    files(tmp_path, {"one.parquet": table("a")})
    datasets.Dataset(table("a")).save_to_disk(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved") if given != "saved" else None
    with pytest.raises(SourceError, match=r"--split '?test'? .*(no splits|means nothing)"):
        open_source(str(tmp_path / given), SourceConfig(split="test"))


CARD = """---
license: mit
configs:
- config_name: {first}
  data_files:
  - split: train
    path: first/part-*.parquet
  - split: extra
    path: [first/more.parquet]
- config_name: second
  data_files: second/**
---
# A dataset
"""


def test_a_card_says_which_files_are_which_split(tmp_path: Path) -> None:
    parts = {"first/part-1.parquet": table("a"), "first/more.parquet": table("m"), "second/x/0.parquet": table("s")}
    place = files(tmp_path, parts | {"README.md": CARD.format(first="default")})
    source = open_source(place)
    assert offered(source) == ["a"]
    assert [refusal.name for refusal in source.refused] == ["second/x/0.parquet"]
    assert source.description.endswith("split train; left out: extra (1 row): --split")
    assert offered(open_source(place, SourceConfig(split="extra"))) == ["m"]
    files(tmp_path, {"README.md": CARD.format(first="first")})
    with pytest.raises(SourceError, match=r"holds 2 configurations .*: first, second; .*give the folder"):
        open_source(place)
    assert offered(open_source(f"{place}/second")) == ["s"]


@pytest.mark.parametrize(
    "card", ["", "---\nconfigs: [3, {}]\n---\n", "---\nconfigs: {\n---\n", "---\n!!python/x configs:\n---"]
)
def test_a_card_that_declares_nothing_leaves_it_to_the_names(card: str) -> None:
    assert declared_rule("x", card) is None


def test_patterns_of_a_card_stop_at_slashes() -> None:
    rule = declared_rule("x", "---\nconfigs:\n- config_name: one\n  data_dir: d\n  data_files: '*/[ab]?.tar'\n---\n")
    assert rule is not None
    paths = ["d/x/a1.tar", "d/x/c1.tar", "d/x/y/a1.tar", "x/a1.tar", "d/x/a1xtar"]
    assert divided(paths, rule).files == {"train": ["d/x/a1.tar"]}


def test_a_pattern_of_many_stars_is_matched_soon() -> None:
    card = f"---\nconfigs:\n- data_files:\n  - split: train\n    path: '{'**/' * 25}x'\n---\n"
    rule = declared_rule("", card)
    assert rule is not None
    assert not rule("a/" * 30 + "y")
    assert list(rule("a/" * 30 + "x")) == ["train"]
