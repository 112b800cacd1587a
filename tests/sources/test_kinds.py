"""One stray file does not decide what a folder is, and what kcache made itself is no part of it."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_folders import metadata, offered, reasons, write

from kcache.errors import SourceError
from kcache.sources import open_source


def pairs(*names: str) -> dict[str, str | bytes]:
    return {f"{name}.{suffix}": name for name in names for suffix in ("jpg", "txt")}


def table(path: Path, rows: int, image: str = "image") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: [b"A"] * rows, "text": ["in the table"] * rows}), path)


def tar(path: Path, *names: str) -> None:
    folder = write(path.parent / f".{path.stem}", pairs(*names))
    shutil.make_archive(str(path.with_suffix("")), "tar", folder)


@pytest.mark.parametrize("stray", ["table", "other table", "tar", "metadata"])
def test_one_stray_file_among_pictures_is_named(tmp_path: Path, stray: str) -> None:
    folder = write(tmp_path, pairs("a", "b", "c"))
    name = {"tar": "sub/x.tar", "metadata": "sub/metadata.csv"}.get(stray, "sub/x.parquet")
    match stray:
        case "tar":
            (folder / "sub").mkdir()
            tar(folder / name, "x")
        case "metadata":
            write(folder, {name: "id,price\n1,2\n"})
        case _:
            table(folder / name, 2, "image" if stray == "table" else "id")
    source = open_source(str(folder))
    assert list(offered(source)) == ["a.jpg", "b.jpg", "c.jpg"]
    assert set(reasons(source)) == {name}


@pytest.mark.parametrize("kind", ["tars", "parquet files"])
def test_stray_pictures_beside_larger_files_are_named(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, {**pairs("banner"), "notes.doc": b"\xd0\xcf"})
    if kind == "tars":
        tar(folder / "00000.tar", "x", "y")
        write(folder, {"00000_stats.json": "{}", "00000.parquet": b"PAR1"})
    else:
        table(folder / "data" / "train.parquet", 2)
    for source in (open_source(str(folder)), open_source(str(folder), max_train_samples=1)):
        assert "banner.jpg" not in offered(source)
        assert set(reasons(source)) == {"banner.jpg", "banner.txt", "notes.doc"}
        assert f"the folder is read as {kind}" in reasons(source)["banner.jpg"]


def test_pictures_that_a_table_gives_the_path_of_do_not_outweigh_it(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"A", "b.jpg": b"B"})
    image = pa.array([{"path": "a.jpg"}, {"path": "b.jpg"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "text": ["a", "b"]}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path), need_captions=False)
    assert offered(source) == {"x.parquet row 0": ("a",), "x.parquet row 1": ("b",)}


def test_what_neither_kind_can_use_is_an_error_of_the_larger_file(tmp_path: Path) -> None:
    write(tmp_path, {"banner.png": b""})
    table(tmp_path / "x.parquet", 1, "picture")
    with pytest.raises(SourceError, match=r"no column 'image'; found picture, text"):
        open_source(str(tmp_path))


@pytest.fixture(params=["cache", "published"])
def cache_beside(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of pictures that holds a cache of them, in either form."""
    folder = write(tmp_path / "photos", pairs("a", "b"))
    shutil.copytree(request.getfixturevalue(request.param), folder / "cache")
    return folder


def test_cache_inside_its_own_source_is_not_looked_into(cache_beside: Path) -> None:
    source = open_source(str(cache_beside))
    assert list(offered(source)) == ["a.jpg", "b.jpg"]
    assert not source.refused
    assert source.description.endswith("; not looked into: cache (a kcache cache)")
    (cache_beside / "cache/manifest.json").unlink()
    assert "cache (a kcache cache that was not finished)" in open_source(str(cache_beside)).description


def test_cache_beside_tars_and_tables_is_not_looked_into(published: str, tmp_path: Path) -> None:
    for name, kind in (("x.tar", "tars"), ("x.parquet", "parquet")):
        folder = tmp_path / kind
        shutil.copytree(published, folder / "sub/cache")
        if kind == "tars":
            tar(folder / name, "x")
        else:
            table(folder / name, 1)
        source = open_source(str(folder))
        assert len(source) == 1
        assert not source.refused
        assert "not looked into: sub/cache (" in source.description


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"plans/0123456789abcdef/plan.json": "{}"}, "that is being built"),
        ({"metrics.jsonl": "{}", "config.json": "{}", "loss.png": b"", "pictures/0.png": b""}, "a run directory"),
        ({"model_index.json": "{}", "movq/config.json": "{}"}, "a pipeline of networks"),
    ],
)
def test_what_kcache_made_is_one_line(tmp_path: Path, files: dict[str, str | bytes], words: str) -> None:
    write(tmp_path, pairs("a"))
    write(tmp_path / "own", files)
    source = open_source(str(tmp_path))
    assert list(offered(source)) == ["a.jpg"]
    assert not source.refused
    assert words in source.description
    with pytest.raises(SourceError, match=words):
        open_source(str(tmp_path / "own"))


def test_folders_that_only_sound_like_kcache_are_read(tmp_path: Path) -> None:
    write(tmp_path, {**pairs("plans/house", "text-0123abcd/a", "checkpoint-1/b"), "plans/index-1.txt": "of a house"})
    write(tmp_path, {"x/metrics.jsonl": "{}", **pairs("x/c"), "x/manifest.json": "{}", "x/state.json": "{}"})
    assert len(open_source(str(tmp_path))) == 4
    assert len(open_source(str(tmp_path / "x"))) == 1  # also where it is named itself


def test_metadata_of_a_part_and_text_files_of_another_serve_together(tmp_path: Path) -> None:
    write(
        tmp_path, {"m/metadata.jsonl": metadata({"file_name": "a.jpg", "text": "row"}), "m/a.jpg": b"A", "m/b.jpg": b""}
    )
    write(tmp_path, pairs("t/c"))
    source = open_source(str(tmp_path))
    assert offered(source) == {"m/a.jpg": ("row",), "t/c.jpg": ("t/c",)}
    assert set(reasons(source)) == {"m/b.jpg"}
    assert source.description == (
        "imagefolder: 2 images, captions from m/metadata.jsonl column 'text' and from .txt files, one per line"
    )


def test_a_range_of_one_tar_is_that_tar(tmp_path: Path) -> None:
    tar(tmp_path / "007.tar", "x")
    for pattern in ("{007..007}", "{007,007}"):
        assert len(open_source(f"{tmp_path}/{pattern}.tar")) == 1
