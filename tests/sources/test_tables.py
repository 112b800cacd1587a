"""Tables as others write them: large row groups, columns without values, shards that do not fit, paths into zips."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache import Cache
from kcache.config import SourceConfig
from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError
from kcache.sources import Source, open_source
from kcache.sources.arrow_files import HeldImages, ParquetFile
from kcache.store.digests import content_key
from kcache.upkeep.info import describe_cache

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def offered(source: Source) -> list[tuple[str, ...]]:
    return [source.captions(i) for i in range(len(source))]


def reasons(source: Source) -> dict[str, str]:
    return {refusal.name: refusal.reason for refusal in source.refused}


def write(folder: Path, **tables: Any) -> str:
    folder.mkdir(exist_ok=True)
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return str(folder)


# ---- one file does not decide over all


def test_a_shard_without_captions_costs_its_rows_by_name(tmp_path: Path) -> None:
    good = {"image": [b"A"], "text": ["a"]}
    place = write(tmp_path, a=good, b={"image": [b"B", b"C"], "text": pa.nulls(2)}, c=good)
    source = open_source(place)
    assert offered(source) == [("a",), ("a",)]
    assert {name: reason[:10] for name, reason in reasons(source).items()} == {
        "b.parquet row 0": "no caption",
        "b.parquet row 1": "no caption",
    }


def test_files_that_do_not_fit_are_left_out_as_a_whole(tmp_path: Path) -> None:
    place = write(
        tmp_path,
        a={"image": [b"A"], "text": ["a"]},
        b={"image": [b"B"], "label": [1]},
        c={"id": [1], "name": ["x"]},
        d={"image": pa.nulls(1), "text": ["d"]},
        e={"image": [b"E"], "text": [5]},
    )
    (tmp_path / "f.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    (tmp_path / "g.parquet").write_bytes(b"<!DOCTYPE html><html><title>404</title></html>")
    source = open_source(place)
    assert offered(source) == [("a",)]
    assert source.description.endswith(", 6 of 7 files left out")
    told = reasons(source)
    assert told["b.parquet"].startswith("has no column 'text'; found image, label")
    assert told["c.parquet"].startswith("has no column 'image'; found id, name")
    assert "holds null; expected image bytes" in told["d.parquet"]
    assert "holds int64; expected strings" in told["e.parquet"]
    assert "Git LFS pointer" in told["f.parquet"]
    assert "HTML page" in told["g.parquet"]


def test_an_error_when_no_file_fits_is_one_line_with_the_columns(tmp_path: Path) -> None:
    place = write(tmp_path, a={"picture": [b"A"], "words": ["a"]}, b={"picture": [b"A"], "words": ["a"]})
    with pytest.raises(SourceError, match=r"a\.parquet has no column 'image'; found picture, words; .*--image-column"):
        open_source(place)
    with pytest.raises(SourceError, match=r"has no column 'text'; .*--caption-column"):
        open_source(place, SourceConfig(image_column="picture"))
    with pytest.raises(SourceError, match=r"has no column 'nosuch'; found picture, words; .*--caption-column"):
        open_source(place, SourceConfig(image_column="picture", caption_column="nosuch"), need_captions=False)


STRINGS = ["a", "b", None]
LISTS = [["a"], ["b", "bb"], []]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(STRINGS, pa.large_string()),
        pa.array(STRINGS, pa.string_view()),
        pa.array(STRINGS).dictionary_encode(),
        pa.array(LISTS, pa.list_(pa.string())),
        pa.array(LISTS, pa.large_list(pa.large_string())),
        pa.array(LISTS, pa.list_view(pa.string())),
        pa.array([["a"], ["b"], None], pa.list_(pa.string(), 1)),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_captions_of_every_type_that_means_text(tmp_path: Path, column: pa.Array) -> None:
    source = open_source(write(tmp_path, x={"image": [b"A", b"B", b"C"], "text": column}))
    assert [captions[0] for captions in offered(source)] == ["a", "b"]
    assert reasons(source)["x.parquet row 2"].startswith("no caption")


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        (pa.large_binary(), b"A"),
        (pa.binary_view(), b"A"),
        (pa.dictionary(pa.int32(), pa.binary()), b"A"),
        (pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]), {"bytes": b"A"}),
        (pa.struct([("bytes", pa.binary())]), {"bytes": b"A"}),
        (pa.struct([("path", pa.string())]), {"path": "a.jpg"}),
        (pa.struct([("bytes", pa.null()), ("path", pa.large_string())]), {"path": "a.jpg"}),
        (pa.struct([("bytes", pa.binary()), ("path", pa.null())]), {"bytes": b"A"}),
    ],
    ids=str,
)
def test_images_of_every_type_that_means_bytes(tmp_path: Path, kind: pa.DataType, cell: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(b"A")
    source = open_source(write(tmp_path, x={"image": pa.array([cell], kind), "text": ["a"]}))
    assert source.image(0) == b"A"
    assert [refusal.name for refusal in source.refused] == ["a.jpg"]


@pytest.mark.parametrize(
    ("cells", "advice"),
    [
        (["https://x/a.jpg"], "files and URLs that text names are not fetched"),
        (pa.array([[{"bytes": b"A", "path": None}]], pa.list_(IMAGE)), "give each picture a row"),
        ([[1, 2]], "expected image bytes"),
    ],
)
def test_what_is_no_image_column_is_told_with_what_to_do(tmp_path: Path, cells: Any, advice: str) -> None:
    with pytest.raises(SourceError, match=advice) as raised:
        open_source(write(tmp_path, x={"image": cells, "text": ["a"]}))
    assert "\n" not in str(raised.value)


# ---- row groups of any size


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rows_are_read_in_any_order_whatever_the_pieces(data: st.DataObject, tmp_path_factory: Any) -> None:
    rows, group = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    path = tmp_path_factory.mktemp("x") / "x.parquet"
    contents = [bytes([i]) * (100 + 37 * i) for i in range(rows)]
    cells = pa.array([{"bytes": content, "path": None} for content in contents], IMAGE)
    pq.write_table(pa.table({"image": cells}), path, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kcache.sources.arrow_files._PIECE_BYTES", data.draw(st.integers(1, 5000)))
        patch.setattr("kcache.sources.arrow_files._HELD_BYTES", data.draw(st.integers(0, 5000)))
        file, held = ParquetFile(path), HeldImages("image")
        for row in data.draw(st.lists(st.integers(0, rows - 1), max_size=30)):
            images, at = held.read(file, row // group, row % group)
            assert images.content(at) == contents[row]


def test_a_large_row_group_is_held_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.sources.arrow_files._PIECE_BYTES", 4000)
    monkeypatch.setattr("kcache.sources.arrow_files._HELD_BYTES", 8000)
    contents = [bytes([i]) * 1000 for i in range(200)]
    place = write(tmp_path, x={"image": contents, "text": [f"{i}" for i in range(200)]})
    source, largest = open_source(place), 0
    with DigestMemo(tmp_path / "memo") as memo:
        assert [source.image_key(i, memo, False) for i in range(200)] == [content_key(c) for c in contents]
    with ThreadPoolExecutor(4) as pool:
        for i, content in enumerate(pool.map(source.image, range(200))):
            largest = max(largest, source.images._bytes)  # type: ignore[attr-defined]
            assert content == contents[i]
    assert 0 < largest <= 8000 + 5000


def test_digests_of_a_row_group_stay_those_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier versions remembered is found again: under the same name, the keys of all rows of the group."""
    place = write(tmp_path, x={"image": [b"A", b"B"], "text": ["a", "b"]})
    asked: dict[str, bytes] = {}

    class Memo:
        def digest(self, path: Path, part: str, compute: Any, rehash: bool) -> bytes:
            return asked.setdefault(part, compute())

    open_source(place).image_key(1, Memo(), False)  # type: ignore[arg-type]
    assert asked == {"content_key of each row of column 'image', chunk 0": content_key(b"A") + content_key(b"B")}


def test_a_group_above_two_gigabytes_is_read_with_little_memory(tmp_path: Path) -> None:
    """Its images are equal, so that the file is small; read at once they would not fit into one array."""
    code = (
        "import sys, resource, pyarrow as pa, pyarrow.parquet as pq; from pathlib import Path\n"
        "from kcache.sources import open_source\n"
        "source = open_source(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(source.image(0)) == len(source.image(2199)) == 1 << 20\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    one = pa.array([{"bytes": bytes(1 << 20), "path": None}], IMAGE)
    schema = pa.schema({"image": IMAGE, "text": pa.string()})
    image = pa.concat_arrays([one] * 2)
    with pq.ParquetWriter(tmp_path / "x.parquet", schema, compression="zstd", use_dictionary=True) as writer:
        writer.write_table(
            pa.Table.from_batches([pa.record_batch({"image": image, "text": ["a", "b"]}, schema=schema)] * 1100),
            row_group_size=2200,
        )
    assert pq.read_metadata(tmp_path / "x.parquet").num_row_groups == 1
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400_000


# ---- paths in rows


def test_images_in_a_zip_are_read_by_the_paths_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    with zipfile.ZipFile(hub / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", b"A" * 5000)
        archive.writestr("sub/b.png", b"B")
    (tmp_path / "link").symlink_to(hub)  # as a moved HF_HOME is
    names = ["a.jpg", "sub/b.png", "c.jpg"]
    chained = [f"zip://{name}::{tmp_path}/link/x.zip" for name in names]
    rows = pa.table(
        {"image": pa.array([{"bytes": None, "path": path} for path in chained], IMAGE), "text": ["a", "b", "c"]}
    )
    pq.write_table(rows, tmp_path / "x.parquet")
    load, cache = datasets.load_dataset, str(tmp_path / "cache")

    def load_local(name: str, *, split: str, keep_in_memory: bool) -> datasets.Dataset:
        return load("parquet", data_files={"train": str(tmp_path / "x.parquet")}, split=split, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "link"))
    source = open_source("owner/pictures")
    assert (source.image(0), source.image(1)) == (b"A" * 5000, b"B")
    with DigestMemo(tmp_path / "memo") as memo:
        assert source.image_key(0, memo, False) == content_key(b"A" * 5000)
        assert source.image_key(1, memo, False) == content_key(b"B")
        with pytest.raises(InputRejected, match=r"no member 'c\.jpg' in 'x\.zip'"):
            source.image_key(2, memo, False)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("zip://a.jpg::/etc/x.zip", "leads out of the source"),
        ("zip://a.jpg::../x.zip", "leads out of the source"),
        ("zip://a.jpg::cut.zip", r"'cut\.zip' cannot be read as a zip: damaged or cut short"),
        ("zip://a.jpg::lfs.zip", "Git LFS pointer"),
        ("zip://big.jpg::x.zip", "it has 600 bytes, more than 500"),
        ("zip://bad.jpg::x.zip", r"'bad\.jpg' in 'x\.zip' cannot be read: Bad CRC-32"),
        ("zip://a.jpg::zip://b.zip::x.zip", "an archive in another; unpack"),
        ("tar://a.jpg::x.tar", "inside a tar; give the tar itself"),
        ("gzip://a.jpg::a.jpg.gz", "behind gzip://, which is not read; unpack"),
        ("hf://datasets/o/n@main/a.jpg", "on the Hub, and was not downloaded; .*hf download"),
        ("https://x/a.jpg", "on the web; download"),
        ("s3://b/a.jpg", "behind s3://, which is not read"),
    ],
)
def test_chained_paths_that_are_not_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    monkeypatch.setattr("kcache.sources.archives.MAX_IMAGE_BYTES", 500)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", b"A")
        archive.writestr("big.jpg", b"B" * 600)
        archive.writestr("bad.jpg", b"find me")
    whole = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(whole.replace(b"find me", b"FIND ME"))
    (tmp_path / "cut.zip").write_bytes(whole[:300])
    (tmp_path / "lfs.zip").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    cells = pa.array([{"bytes": None, "path": path}, {"bytes": None, "path": "zip://a.jpg::x.zip"}], IMAGE)
    source = open_source(write(tmp_path, x={"image": cells, "text": ["a", "b"]}))
    with DigestMemo(tmp_path / "memo") as memo:
        for read in (lambda: source.image(0), lambda: source.image_key(0, memo, False)):
            with pytest.raises(InputRejected, match=reason) as raised:
                read()
            assert "\n" not in raised.value.reason
        assert source.image_key(1, memo, False) == content_key(b"A")


def test_a_zip_behind_a_link_is_read_and_digested_where_links_may_lead(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    with zipfile.ZipFile(tmp_path / "pool" / "x.zip", "w") as archive:
        archive.writestr("a.jpg", b"A")
    cells = pa.array([{"bytes": None, "path": "zip://a.jpg::x.zip"}], IMAGE)
    place = write(tmp_path / "rows", x={"image": cells, "text": ["a"]})
    (tmp_path / "rows" / "x.zip").symlink_to("../pool/x.zip")
    source = open_source(place, SourceConfig(follow_links=str(tmp_path / "pool")))
    with DigestMemo(tmp_path / "memo") as memo:
        assert source.image(0) == b"A"
        assert source.image_key(0, memo, False) == content_key(b"A")


# ---- datasets of the Hub


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "Config name is missing.\nPlease pick one among the available configs: ['en', 'fr']\nExample:\n\t…",
            r"has several configurations: en, fr; expected one; .*save_to_disk\(FOLDER\)",
        ),
        ("Unknown split \"train\". Should be one of ['test', 'dev'].", "no split 'train'; found test, dev; .*--split"),
        ("something\nelse", "cannot be loaded: something else; expected a path"),
    ],
)
def test_why_a_dataset_of_the_hub_is_not_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: str, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError(error)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SourceError, match=said) as raised:
        open_source("owner/pictures")
    assert "\n" not in str(raised.value)


# ---- several rows of one picture


def test_rows_of_one_picture_are_samples_of_their_own_and_it_is_encoded_once(
    tmp_path: Path, oracle: Path, build: Callable[..., str]
) -> None:
    one, other = (path.read_bytes() for path in sorted((oracle / "data").glob("*.png"))[:2])
    place = write(tmp_path / "rows", x={"image": [one, one, other, one], "text": ["a", "b", "c", "a"]})
    path = build(Path(place), stage="prior")
    cache = Cache.open(path)
    assert len(cache) == 4
    rows = cache.read([0, 1, 2, 3], ["image_embeds"])["image_embeds"]
    assert (rows[0] == rows[1]).all()
    assert (rows[0] != rows[2]).any()
    assert describe_cache(path)["tables"]["image_embeds"]["rows"] == 3  # with the reserved one
