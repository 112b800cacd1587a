"""What is asked for beside pictures and captions: control images and numbers, the same of whatever kind a source is."""

import csv
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_bucket import put
from source_folders import metadata, offered, reasons, write

from kcache.config import SourceConfig, TrainConfig
from kcache.disk.memo import DigestMemo
from kcache.errors import ConfigError, InputRejected, SourceError
from kcache.sources import Source, open_source
from kcache.sources.further.numbers import MOST_REPEATS, number_in
from kcache.sources.in_tars.offers import offer_part
from kcache.sources.protocol import Request
from kcache.sources.tars import TarPiece
from kcache.store.digests import NO_CONTROL, content_key

IMAGES = {"a": b"A", "b": b"BB"}
DEPTHS = {"a": b"depth of A", "b": b"depth of B"}
HOLES = {"b": b"hole of B"}
CONTROLS: dict[str, Any] = {"hint_column": ("far=depth",), "mask_column": "hole", "loss_mask_alpha": True}
COUNTS = {"weight_column": "w", "repeats_column": "n"}
KEYS_OF_HOLES = {"a": NO_CONTROL, "b": content_key(b"hole of B")}
NUMBERS: dict[str, tuple[float, int]] = {"a": (0.25, 1), "b": (1.0, 3)}
"""Where one is that of a sample of which nothing is told, nothing is."""


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows() -> list[dict[str, Any]]:
    return [
        {"file_name": f"{key}.jpg", "text": key, "depth": f"maps/{key}.png",
         "hole": f"holes/{key}.png" if key in HOLES else None,
         "w": weight if weight != 1 else None, "n": repeats if repeats != 1 else None}
        for key, (weight, repeats) in NUMBERS.items()
    ]  # fmt: skip


def beside(folder: Path) -> str:
    files = {f"{key}.jpg": image for key, image in IMAGES.items()} | {f"{key}.txt": key.encode() for key in IMAGES}
    files |= {f"{key}.depth.{'png' if key == 'a' else 'WEBP'}": depth for key, depth in DEPTHS.items()}
    return str(write(folder, {**files, **{f"{key}.hole.png": hole for key, hole in HOLES.items()}}))


def described(folder: Path, name: str) -> str:
    files: dict[str, str | bytes] = {f"{key}.jpg": image for key, image in IMAGES.items()}
    files |= {f"maps/{key}.png": depth for key, depth in DEPTHS.items()}
    write(folder, files | {f"holes/{key}.png": hole for key, hole in HOLES.items()})
    if name.endswith("jsonl"):
        (folder / name).write_text(metadata(*rows()))
    elif name.endswith("csv"):
        with (folder / name).open("w") as file:
            writer = csv.DictWriter(file, rows()[0])
            writer.writeheader()
            writer.writerows(rows())
    else:
        pq.write_table(pa.Table.from_pylist(rows()), folder / name)
    return str(folder)


def table(folder: Path) -> str:
    images = [{"bytes": depth, "path": None} for depth in DEPTHS.values()]
    columns = {
        "image": [*IMAGES.values()], "text": [*IMAGES], "depth": images, "hole": [HOLES.get(key) for key in IMAGES],
        "w": pa.array([0.25, None], pa.float16()), "n": ["", " 3 "],
    }  # fmt: skip
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return str(folder)


def members() -> dict[str, bytes]:
    found = {}
    for row in rows():
        key = row["text"]
        found |= {f"{key}.jpg": IMAGES[key], f"{key}.json": json.dumps(row).encode(), f"{key}.txt": key.encode()}
        found |= {f"{key}.Depth.png": DEPTHS[key]} | ({f"{key}.hole.tif": HOLES[key]} if key in HOLES else {})
    return found


def tars(folder: Path) -> str:
    folder.mkdir()
    return str(tar_of(folder / "0.tar", members()).parent)


@pytest.fixture(
    params=["beside", "metadata.jsonl", "metadata.csv", "metadata.parquet", "table", "tars", "tars in a bucket"]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A source of two samples, with hints, a mask, and, but for the first kind, numbers."""
    folder, kind = tmp_path / "source", request.param
    if kind == "tars in a bucket":
        return str(put(Path(tars(folder)), f"memory://further/{tmp_path.name}"))
    return {"beside": beside, "table": table, "tars": tars}.get(kind, lambda at: described(at, kind))(folder)


def said(source: Source, memo: DigestMemo, rehash: bool = False) -> list[tuple[Any, ...]]:
    names = ("hint-far", "loss_masks")
    return [
        (*source.captions(i), source.control_keys(i, memo, rehash), *(source.control(i, name) for name in names),
         source.counts(i))
        for i in range(len(source))
    ]  # fmt: skip


def test_every_kind_offers_the_same(place: str, request: pytest.FixtureRequest) -> None:
    numbered = "beside" not in request.node.callspec.id
    with DigestMemo() as memo:
        source = open_source(place, SourceConfig(**CONTROLS, **(COUNTS if numbered else {})), memo=memo)
        found = [said(source, memo, rehash) for rehash in (False, True)]
        expected = [
            (key, (content_key(DEPTHS[key]), content_key(image), KEYS_OF_HOLES[key]), DEPTHS[key], image,
             NUMBERS[key] if numbered else (1.0, 1))
            for key, image in IMAGES.items()
        ]  # fmt: skip
        assert found == [expected, expected]
        assert source.control(1, "masks") == HOLES["b"]
        assert not source.refused
        with pytest.raises(SourceError, match=r"not told where hint-other are; .* give --hint-column other=COLUMN"):
            source.control(0, "hint-other")
        bare = open_source(place)
        assert [(bare.counts(i), bare.control_keys(i, memo, False)) for i in range(2)] == [((1.0, 1), ())] * 2


@pytest.mark.parametrize(
    "given", [{"mask_column": "nosuch"}, {"hint_column": ("far=nosuch",)}, {"weight_column": "no"}]
)
def test_a_column_that_is_nowhere_is_said(place: str, given: dict[str, Any]) -> None:
    (flag,) = SourceConfig(**given).flags
    with pytest.raises(SourceError, match=flag):
        open_source(place, SourceConfig(**given))


def test_a_picture_without_its_hint_is_refused_by_name_and_so_is_one_with_two(tmp_path: Path) -> None:
    folder = Path(beside(tmp_path / "beside"))
    (folder / "a.depth.png").unlink()
    write(
        folder,
        {"b.depth.jpg": b"other", "c.jpg": b"C", "c.txt": "c", "c.jpg.depth.png": b"depth of C", "x.depth.png": b"X"},
    )
    asked = SourceConfig(hint_column=("far=depth",))
    source = open_source(str(folder), asked)
    assert list(offered(source)) == ["a.jpg", "b.hole.png", "c.jpg"][::2]
    with DigestMemo() as memo:
        with pytest.raises(InputRejected, match=r"no 'a\.depth\.png' beside it, for --hint-column far=COLUMN"):
            source.control_keys(0, memo, False)
        assert source.control_keys(1, memo, False) == (content_key(b"depth of C"),)
    assert "'b.depth.WEBP' and 'b.depth.jpg' are both its depth" in reasons(source)["b.jpg"]
    assert "an image called .depth without a picture 'x'" in reasons(source)["x.depth.png"]
    parts = members() | {"a.depth.jpg": b"other", "c.jpg": b"C", "c.txt": b"c"}
    names = sorted(parts)  # those of a key side by side
    of_tar = reasons(open_source(str(tar_of(tmp_path / "x.tar", {name: parts[name] for name in names})), asked))
    assert "'a.Depth.png' and 'a.depth.jpg' are both its depth" in of_tar["x.tar/a"]
    assert r"there is no 'c.depth.png' among its members (jpg, txt), for --hint-column far=COLUMN" in of_tar["x.tar/c"]


def test_a_column_that_begins_with_a_sign_is_the_end_of_a_name(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"A", "a.txt": "a", "a-masklabel.png": b"M", "b.c.jpg": b"B", "b.c.txt": "b"})
    source = open_source(str(tmp_path), SourceConfig(loss_mask_column="-masklabel"))
    with DigestMemo() as memo:
        assert [source.control_keys(i, memo, False) for i in range(2)] == [(content_key(b"M"),), (NO_CONTROL,)]
    assert list(offered(source)) == ["a.jpg", "b.c.jpg"]


def test_rows_of_metadata_are_read_as_warily_as_the_names_of_pictures(tmp_path: Path) -> None:
    good = {"text": "t", "depth": "maps/a.png", "w": 2}
    changes: list[dict[str, Any]] = [
        {}, {"depth": "../secret.png"}, {"depth": "maps/A.png"}, {"depth": 3}, {"w": "x"}, {"n": 1.5}, {"w": True},
        {"w": float("nan")}, {"depth": "a0.jpg"},
    ]  # fmt: skip
    told = [{"file_name": f"a{i}.jpg"} | good | change for i, change in enumerate(changes)]
    told += [{"file_name": "a0.jpg", "text": "again"}, {"file_name": "b.jpg"} | good, {"file_name": "b.jpg", "w": 3}]
    folder = write(tmp_path / "source", {f"a{i}.jpg": bytes([i]) for i in range(len(changes))})
    write(folder, {"b.jpg": b"B", "maps/a.png": b"D", "metadata.jsonl": metadata(*told), "../secret.png": b"secret"})
    source = open_source(str(folder), SourceConfig(hint_column=("far=depth",), **COUNTS))
    # The last names a picture, which is one all the same.
    assert offered(source) == {"a0.jpg": ("t", "again"), "a8.jpg": ("t",)}
    assert [source.counts(i) for i in range(2)] == [(2.0, 1)] * 2
    assert [source.control(i, "hint-far") for i in range(2)] == [b"D", bytes([0])]
    words = {
        "a1.jpg": "metadata.jsonl line 2: depth '../secret.png': path '../secret.png' leads out of the source",
        "a2.jpg": "did you mean 'maps/a.png'?",
        "a3.jpg": "depth is 3; expected a path relative to the metadata file",
        "a4.jpg": "w is x; expected a number, 0 or more, for --weight-column",
        "a5.jpg": "n is 1.5; expected a whole number, 1 to 1,000,000, for --repeats-column",
        "a6.jpg": "w is True; expected a number",
        "a7.jpg": "w is nan; expected a number",
        "b.jpg": "line 12: weight is 3.0, and in another row 2.0; expected one",
    }
    assert [name for name, text in words.items() if text not in reasons(source)[name]] == []
    assert reasons(source).keys() == words.keys()


def test_wrong_numbers_cost_their_row(tmp_path: Path) -> None:
    columns = {"image": [b"A", b"B"], "text": ["a", "b"], "n": [0, 2], "w": ["1e-3", "0"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    pq.write_table(pa.table(columns | {"more": [True, False]}), tmp_path / "y.parquet")
    source = open_source(str(tmp_path / "x.parquet"), SourceConfig(**COUNTS))
    assert (len(source), source.counts(0)) == (1, (0.0, 2))
    assert reasons(source)["x.parquet row 0"].startswith("n is 0; expected a whole number")
    with pytest.raises(SourceError, match=r"column 'more' that holds bool; expected numbers; .* --weight-column"):
        open_source(str(tmp_path / "y.parquet"), SourceConfig(weight_column="more"))
    tar_of(tmp_path / "x.tar", members() | {"c.jpg": b"C", "c.json": b'{"text": "c", "w": -1}'})
    source = open_source(str(tmp_path / "x.tar"), SourceConfig(**COUNTS))
    assert reasons(source) == {"x.tar/c": "w is -1; expected a number, 0 or more, for --weight-column"}


def test_what_was_remembered_of_tars_before_counts_and_control_images_are_looked_through_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.disk.memo._RACY_NS", -10_000_000_000)  # files count as settled
    plain = Request(
        config=SourceConfig(image_column="jpg", loss_mask_alpha=True), max_train_samples=None, need_captions=True
    )
    assert offer_part(plain).endswith(', ["jpg", null, true]')
    asked = Request(config=SourceConfig(**CONTROLS, **COUNTS), max_train_samples=None, need_captions=True)
    assert offer_part(asked).endswith('{"hint-far": "depth", "masks": "hole", "weight": "w", "repeats": "n"}]')
    place = Path(tars(tmp_path / "source"))
    piece = TarPiece(path=place / "0.tar", request=asked)
    with DigestMemo() as memo:
        assert not piece.is_known(memo)
        piece.look(memo)
        assert piece.is_known(memo)
        monkeypatch.setattr("kcache.sources.tars.joined_keys", lambda *_: pytest.fail("read again"))
        keys = open_source(str(place), asked.config, memo=memo).control_keys(1, memo, False)
        assert keys == (content_key(DEPTHS["b"]), content_key(IMAGES["b"]), content_key(HOLES["b"]))


def test_flags_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    place = beside(tmp_path / "beside")
    for name in COUNTS:
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(SourceError, match=rf"{flag} 'x' was given, but means nothing .* a text file each"):
            open_source(place, SourceConfig(**{name: "x"}))
        with pytest.raises(ConfigError, match=f"{flag} with --online: .* is the cache's"):
            TrainConfig(stage="decoder", output_dir="run", online="photos", **{name: "x"})


CELLS = st.one_of(
    st.text(max_size=12), st.integers(), st.floats(), st.booleans(), st.none(), st.decimals(allow_nan=False),
    st.from_regex(r"[ +-]?[0-9_.,]{1,6}([eE]-?[0-9]{1,4})?", fullmatch=True), st.just("9" * 500), st.just(10**400),
)  # fmt: skip


@given(cell=CELLS)
def test_a_cell_is_a_number_in_range_or_refused(cell: Any) -> None:
    for name, most in (("weight", 3.4e38), ("repeats", MOST_REPEATS)):
        try:
            number = number_in(name, "c", cell)
        except InputRejected:
            continue
        if number is None:
            assert cell is None or not cell.strip()
            continue
        assert type(number) is (float if name == "weight" else int)
        assert math.isfinite(number)
        assert (0 if name == "weight" else 1) <= number <= most
        assert number == float(cell)
        assert "_" not in str(cell)
