"""A source looked through in pieces: what the memo is told by whoever looked spares reading, and changes nothing."""

import io
import tarfile
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_bucket import put

from kcache.config import AS_FOUND, BuildConfig
from kcache.disk.memo import DigestMemo
from kcache.disk.pieces import Ahead, Piece
from kcache.engines.ahead import _Turn, look_ahead, look_through
from kcache.errors import EngineError, InputRejected, StoreError
from kcache.places.bucket import BucketPath
from kcache.places.effects import write_bytes
from kcache.sources import Source, open_source
from kcache.sources.protocol import Request
from kcache.sources.tars import TarPiece

VERSION = version("kcache")
WHOLE = Request(config=AS_FOUND, max_train_samples=None, need_captions=True)
Said = tuple[list[tuple[str, tuple[str, ...], bytes]], object, str]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files written by the test count as settled, and nothing is known of them; pieces are small."""
    monkeypatch.setattr("kcache.disk.memo._RACY_NS", -10_000_000_000)
    monkeypatch.setattr("kcache.sources.folder._RUN", 2)
    monkeypatch.setattr("kcache.sources.arrow_files._RUN_ROWS", 3)
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))


def tars(folder: Path) -> Path:
    """Two tars of four samples, with one that is no tar and one that is cut short."""
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for i in range(4):
                for name, content in ((f"{i}.jpg", bytes([number, i]) * 900), (f"{i}.txt", b"a %d" % i)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "2.tar").write_bytes((folder / "2.tar").read_bytes()[:5000])
    (folder / "3.tar").write_text("text")
    return folder


def tables(folder: Path) -> Path:
    """Two files of two row groups; one row has no picture, and one has no caption."""
    folder.mkdir()
    for number in range(2):
        images = [bytes([number, i]) * 50 for i in range(6)]
        rows = {"image": [*images[:5], None] if number else images, "text": [None, *"abcde"]}
        pq.write_table(pa.table(rows), folder / f"{number}.parquet", row_group_size=3)
    return folder


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(bytes([i]) * 80)
        (folder / f"{i}.txt").write_text(f"a {i}")
    return folder


def far_tars(folder: Path) -> BucketPath:
    return put(tars(folder), f"memory://ahead/{folder.parent.name}")


def said(place: Path | BucketPath, ahead: Ahead | None, rehash: bool = False) -> Said:
    """What a survey asks of a source."""
    with DigestMemo() as memo:
        source = open_source(str(place), memo=memo, **({} if ahead is None else {"ahead": ahead}))
        samples = [(source.name(i), source.captions(i), key(source, i, memo, rehash)) for i in range(len(source))]
        return samples, source.refused, source.description


def key(source: Source, i: int, memo: DigestMemo, rehash: bool) -> bytes:
    try:
        return source.image_key(i, memo, rehash)
    except InputRejected as rejection:
        return rejection.reason.encode()


def elsewhere(pieces: Sequence[Piece], memo: DigestMemo) -> None:
    """What tasks do, without a cluster."""
    for piece in pieces:
        entries = look_through(piece, VERSION).found
        memo.learn(zip(*(column.to_pylist() for column in entries.columns), strict=True))


MADE = pytest.mark.parametrize("make", [tars, far_tars, tables, pictures])


@MADE
@pytest.mark.parametrize("rehash", [False, True])
def test_what_was_looked_through_elsewhere_is_not_read_again(
    make: Callable[[Path], Path], rehash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make(tmp_path / "source")
    expected = said(place, None)
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "other"))
    known = list[bool]()

    def looked(pieces: Sequence[Piece], memo: DigestMemo) -> None:
        assert not any(piece.is_known(memo) for piece in pieces)
        elsewhere(pieces, memo)
        known.extend(piece.is_known(memo) for piece in pieces)
        for name in ("sources.tars.joined_keys", "sources.arrow_files.content_key", "sources.folder.read_file"):
            monkeypatch.setattr(f"kcache.{name}", lambda *_: pytest.fail("read again"))

    assert said(place, looked, rehash) == expected
    assert known.count(True) >= 3
    monkeypatch.undo()
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr("kcache.sources.tars.joined_keys", lambda *_: pytest.fail("read by the next one"))
    monkeypatch.setattr("kcache.sources.folder.read_file", lambda *_: pytest.fail("read by the next one"))
    assert said(place, None)[0] == expected[0]


@pytest.mark.parametrize("make", [tars, far_tars, pictures])
def test_what_changed_since_it_was_looked_through_is_read_again(make: Callable[[Path], Path], tmp_path: Path) -> None:
    place, other = make(tmp_path / "source"), make(tmp_path / "other")
    name = "1.png" if make is pictures else "1.tar"
    before = said(other, None)[0]

    def changed(pieces: Sequence[Piece], memo: DigestMemo) -> None:
        noted = [entry for piece in pieces for entry in look_through(piece, VERSION).found.to_pylist()]
        zero = "0" + name[1:]
        write_bytes(place / name, (other / zero).read_bytes())
        memo.learn([tuple(entry.values()) for entry in noted])

    samples = [key for _, _, key in said(place, changed)[0]]
    zeroth = [key for name_, _, key in before if name_.startswith("0")]
    assert [k for k in samples if k in zeroth] == zeroth * 2


def test_what_cannot_be_looked_through_elsewhere_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tars(tmp_path / "source")
    expected = said(place, None)
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "other"))
    troubles = list[str]()

    def unseen(pieces: Sequence[Piece], memo: DigestMemo) -> None:
        place.rename(tmp_path / "away")
        troubles.extend(look_through(piece, VERSION).trouble for piece in pieces)
        (tmp_path / "away").rename(place)

    assert said(place, unseen) == expected
    assert len(troubles) == 4
    assert all("No such file" in trouble for trouble in troubles)


def test_a_store_that_fails_is_told_as_the_survey_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = far_tars(tmp_path / "source")

    def fail(path: BucketPath, *_: int) -> memoryview:
        raise StoreError(f"{path}: no connection")

    monkeypatch.setattr(BucketPath, "read_range", fail)
    with pytest.raises(StoreError, match="no connection"):
        said(place, elsewhere)


def test_pieces_of_a_few_samples_are_those_that_have_them(tmp_path: Path) -> None:
    names = list[str]()
    for make in (tars, tables, pictures):
        place = make(tmp_path / make.__name__)
        with DigestMemo() as memo:
            open_source(
                str(place), max_train_samples=3, memo=memo,
                ahead=lambda pieces, _: names.extend(Path(piece.name).name for piece in pieces),
            )  # fmt: skip
    assert names == ["0.tar", "0.parquet, row groups 0 to 0", "0.parquet, row groups 1 to 1", "1.png", "2.png"]


def test_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"kcache is .*, and 99\.0 where this was started"):
        look_through(None, "99.0")  # type: ignore[arg-type]


def test_a_single_piece_needs_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.engines.ahead.joined", lambda *_: pytest.fail("a cluster was joined"))
    place = pictures(tmp_path / "source")
    config = BuildConfig(engine="ray")

    def ahead(pieces: Sequence[Piece], memo: DigestMemo) -> None:
        elsewhere(pieces[1:], memo)
        look_ahead(config, pytest.fail, pieces, memo)

    said(place, ahead)


def test_a_piece_that_costs_whoever_has_it_its_process_is_named(tmp_path: Path) -> None:
    from ray.exceptions import WorkerCrashedError

    def get(_: object) -> None:
        raise WorkerCrashedError

    with DigestMemo(tmp_path / "memo") as memo:
        turn = _Turn(SimpleNamespace(get=get), memo, pytest.fail, deque(), 1)
        with pytest.raises(EngineError, match=r"0\.tar was looked through by 5 tasks, and each was lost \(.*\); exp"):
            turn._answer(None, TarPiece(path=tmp_path / "0.tar", request=WHOLE))
