"""Tars as a source: what webdataset and img2dataset write is offered, whatever else stands in a tar is named."""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from kcache.config import SourceConfig
from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected, SourceError
from kcache.sources import Source, open_source
from kcache.sources.archives import MAX_HEADER_BYTES, list_members
from kcache.sources.in_tars.braces import expand_braces
from kcache.store.digests import content_key

FOLDERS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)


@pytest.fixture
def memo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DigestMemo]:
    with DigestMemo(tmp_path_factory.mktemp("memo") / "digests.sqlite") as memo:
        yield memo


def tar_of(path: Path, *members: tuple[str, bytes], **options: Any) -> Path:
    """A tar of regular members in the order given; an image is any bytes, because no source may open one."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def offered(source: Source) -> dict[str, tuple[str, ...]]:
    return {source.name(i): source.captions(i) for i in range(len(source))}


def reasons(source: Source) -> dict[str, str]:
    assert {refusal.stage for refusal in source.refused} <= {"source"}
    return {refusal.name: refusal.reason for refusal in source.refused}


def header(**changes: bytes) -> bytes:
    """A tar header of a regular file a.jpg of no bytes, some of its fields replaced."""
    block = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    places = {"name": 0, "size": 124, "kind": 156, "sparse": 386, "isextended": 482}
    for field, content in changes.items():
        block[places[field] : places[field] + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


# ---- what is offered


def test_what_webdataset_writes_is_offered(tmp_path: Path, memo: DigestMemo) -> None:
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as writer:
        writer.write({"__key__": "0001", "jpg": b"A", "txt": "a cat", "cls": 3})
        writer.write({"__key__": "sub/0002", "png": b"BB", "json": {"text": ["one", "two"]}})
    source = open_source(str(tmp_path / "00000.tar"))
    assert offered(source) == {"00000.tar/0001": ("a cat",), "00000.tar/sub/0002": ("one", "two")}
    assert [source.image(i) for i in range(2)] == [b"A", b"BB"]
    assert [source.image_key(i, memo, False) for i in range(2)] == [content_key(b"A"), content_key(b"BB")]
    assert not source.refused
    assert source.description == "webdataset: 2 images in 1 tar, captions from .json members, 'text' and .txt members"


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    names = [
        ("a.b.jpg", b"1"),
        ("sub.x/0001.JPG", b"2"),
        ("sub.x/0001.txt", b"t"),
        ("v1.0.jpg", b"3"),
        ("d/e.jpg", b"4"),
    ]
    path = tar_of(tmp_path / "x.tar", *names)
    with path.open("rb") as file:
        grouped = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])))
    read = {f"x.tar/{sample['__key__']}": sample["jpg"] for sample in grouped if "jpg" in sample}
    source = open_source(str(path), need_captions=False)
    assert {source.name(i): source.image(i) for i in range(len(source))} == read
    assert "key ends at the first dot" in reasons(source)["x.tar/v1"]


def test_a_folder_of_img2dataset_offers_finished_tars(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        about = json.dumps({"caption": "a dog", "url": "https://x", "width": 3}).encode()
        tar_of(
            tmp_path / f"{shard}.tar", ("000000001.jpg", b"A"), ("000000001.json", about), ("000000001.txt", b"a cat")
        )
        (tmp_path / f"{shard}.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert offered(source) == {"00000.tar/000000001": ("a cat",)}
    assert reasons(source)["00001.tar"].startswith("unfinished: there is no 00001_stats.json")
    with pytest.raises(SourceError, match="unfinished"):
        open_source(str(tmp_path / "00001.tar"))


def test_captions_in_json_are_found_by_column(tmp_path: Path) -> None:
    rows = {"a": {"text": "t", "caption": "c"}, "b": {"caption": "c"}, "c": {"alt": "x"}, "d": {"caption": None}}
    members = [m for key, row in rows.items() for m in ((f"{key}.jpg", b""), (f"{key}.json", json.dumps(row).encode()))]
    path = str(tar_of(tmp_path / "x.tar", *members))
    assert offered(open_source(path)) == {"x.tar/a": ("t",), "x.tar/b": ("c",)}
    assert offered(open_source(path, SourceConfig(caption_column="alt")))["x.tar/c"] == ("x",)
    assert set(reasons(open_source(path))) == {"x.tar/c", "x.tar/d"}
    bare = offered(open_source(path, need_captions=False))
    assert (bare["x.tar/c"], bare["x.tar/d"]) == ((), ())


def test_braces_name_tars_in_several_folders(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for number in range(3):
            tar_of(tmp_path / folder / f"{number:02d}.tar", ("k.jpg", b"A"), ("k.txt", b"t"))
    source = open_source(f"{tmp_path}/{{a,b}}/{{00..02}}.tar", max_train_samples=5)
    assert list(offered(source)) == [f"{name}.tar/k" for name in ("a/00", "a/01", "a/02", "b/00", "b/01")]
    with pytest.raises(SourceError, match=r"1 of the 4 tars .* missing, such as 03\.tar"):
        open_source(f"{tmp_path}/a/{{00..03}}.tar")


@given(first=st.integers(0, 300), count=st.integers(2, 40), width=st.integers(1, 6))
def test_ranges_count_as_a_shell_does(first: int, count: int, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "is_file", lambda _: True)
        labels = [label for label, _ in expand_braces(f"x/s-{{{first:0{width}d}..{first + count - 1:0{width}d}}}.tar")]
    padded = f"{first:0{width}d}".startswith("0") and len(f"{first:0{width}d}") > 1
    digits = len(f"{first + count - 1:0{width}d}") if padded else 1
    assert labels == [f"s-{number:0{digits}d}.tar" for number in range(first, first + count)]


@pytest.mark.parametrize("spec", ["{0..9999999999}.tar", "{0..9999}{0..9999}.tar", "{0..3}.zip", "{x}.tar", "a{.tar"])
def test_patterns_that_are_none_are_refused(spec: str) -> None:
    with pytest.raises(SourceError, match=r"expected"):
        open_source(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pipe:touch marker", "a URL or a command; expected .*; download"),
        ("https://x/{0..9}.tar", "a URL of the web; download"),
        ("oss://b/{0..9}.tar", "a URL of an object store, .*; copy it with the store's own tool, e.g. ossutil sync"),
        ("hf://datasets/a/b", "a URL of the Hugging Face Hub, .*of pictures give the id"),
        ("me@host:photos", "a place on another machine; .*rsync"),
        ("file:///data/x", "there is no file or folder '/data/x'"),
    ],
)
def test_urls_are_refused_by_what_they_are(spec: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(spec)


def test_keys_are_remembered_by_tar_and_place(
    tmp_path: Path, memo: DigestMemo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar_of(tmp_path / "x.tar", ("a.jpg", b"A"), ("b.jpg", b"B"))
    monkeypatch.setattr("kcache.disk.memo._RACY_NS", -(10**9))
    source = open_source(str(path), need_captions=False)
    keys = [source.image_key(i, memo, False) for i in range(2)]
    monkeypatch.setattr("kcache.sources.archives.content_at", lambda *_: pytest.fail("read again"))
    assert [source.image_key(i, memo, False) for i in range(2)] == keys == [content_key(b"A"), content_key(b"B")]
    tar_of(path, ("a.jpg", b"C"), ("b.jpg", b"D"))
    monkeypatch.undo()
    source = open_source(str(path), need_captions=False, memo=memo)
    assert [source.image_key(i, memo, False) for i in range(2)] == [content_key(b"C"), content_key(b"D")]


def test_what_is_remembered_wrongly_is_found_out_again(
    tmp_path: Path, memo: DigestMemo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.disk.memo._RACY_NS", -(10**9))
    path = str(tar_of(tmp_path / "a.tar", ("1.jpg", b"A"), ("1.txt", b"as it was")))
    open_source(path, memo=memo)
    tar_of(tmp_path / "b.tar", ("1.jpg", b"A"), ("1.txt", b"as it is."))
    with (tmp_path / "a.tar").open("r+b") as file:  # by what leaves no trace: a fault of the disk
        file.write((tmp_path / "b.tar").read_bytes())
    folder, entries = str(tmp_path), memo._folders[str(tmp_path)]
    stamp = memo._examined(path)[2]
    memo._folders[folder] = {entry: (stamp, digest) for entry, (_, digest) in entries.items()}
    memo.flush()
    memo._connection.execute("UPDATE digests SET stamp = ?", (stamp,))  # type: ignore[union-attr]
    assert offered(open_source(path, memo=memo)) == {"a.tar/1": ("as it was",)}
    assert offered(open_source(path, memo=memo, rehash=True)) == {"a.tar/1": ("as it is.",)}
    memo._connection.execute("UPDATE digests SET digest = substr(digest, 1, 40) || x'00'")  # type: ignore[union-attr]
    assert offered(open_source(path, memo=memo)) == {"a.tar/1": ("as it is.",)}


def test_the_first_samples_are_told_of_as_if_there_were_no_others(tmp_path: Path, memo: DigestMemo) -> None:
    members = [("a.jpg", b"A"), ("a.txt", b"t"), ("mute.jpg", b"B"), ("b.jpg", b"C"), ("b.json", b'{"text": "u"}')]
    path = str(tar_of(tmp_path / "x.tar", *members))
    for _ in range(2):  # the second time it is remembered
        source = open_source(path, max_train_samples=1, memo=memo)
        assert (offered(source), source.refused) == ({"x.tar/a": ("t",)}, ())
        assert source.description == "webdataset: 1 image in 1 tar, captions from .txt members"
        assert len(open_source(path, memo=memo).refused) == 1


def test_a_tar_that_becomes_shorter_costs_the_pictures_that_are_gone(tmp_path: Path, memo: DigestMemo) -> None:
    path = tar_of(tmp_path / "x.tar", ("a.jpg", b"A"), ("b.jpg", b"B" * 600))
    source = open_source(str(path), need_captions=False)
    path.write_bytes(path.read_bytes()[:1600])
    assert source.image_key(0, memo, False) == content_key(b"A")
    with pytest.raises(InputRejected, match="has become shorter"):
        source.image_key(1, memo, False)


# ---- what is refused


def test_members_that_are_no_sample_are_named(tmp_path: Path) -> None:
    members = [("good.jpg", b""), ("good.txt", b"t"), ("good.pkl", b""), ("x/.hidden.jpg", b""), ("__notes__", b"")]
    members += [("bare", b""), ("only.txt", b"t"), ("zipped.jpg.gz", b""), ("two.jpg", b""), ("two.png", b"")]
    members += [
        ("mute.jpg", b""),
        ("latin.jpg", b""),
        ("latin.txt", b"caf\xe9"),
        ("list.jpg", b""),
        ("list.json", b"[]"),
    ]
    members += [
        ("deep.jpg", b""),
        ("deep.json", b"[" * 100_000),
        ("long.jpg", b""),
        ("long.txt", bytes(1 << 20) + b"x"),
    ]
    members += [("../up.jpg", b""), ("/abs.jpg", b"")]
    source = open_source(str(tar_of(tmp_path / "x.tar", *members)))
    assert offered(source) == {"x.tar/good": ("t",)}
    found = reasons(source)
    expected = {
        "bare": "no extension", "only": "no image", "zipped": "no image", "two": "images among its members (jpg, png)",
        "mute": "no captions", "latin": "not UTF-8", "list": "no JSON object", "deep": "not JSON",
        "long": "more than 1,048,576", "../up": "leads out of the tar", "/abs": "leads out of the tar",
    }  # fmt: skip
    assert found.keys() == {f"x.tar/{name}" for name in expected}
    assert {name for name, reason in expected.items() if reason not in found[f"x.tar/{name}"]} == set()


def test_apart_and_repeated_members_cost_their_key(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"t"), ("b.txt", b"t"), ("c.jpg", b"3"), ("c.jpg", b"4")]
    members += [("d.jpg", b"5"), ("d.txt", b"t")]
    source = open_source(str(tar_of(tmp_path / "x.tar", *members)))
    assert offered(source) == {"x.tar/d": ("t",)}
    assert "'a.txt' stands apart" in reasons(source)["x.tar/a"]
    assert "'b.txt' stands apart" in reasons(source)["x.tar/b"]
    assert "two members 'c.jpg'" in reasons(source)["x.tar/c"]


def test_members_that_are_no_regular_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        kinds = {"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE, "node": tarfile.CHRTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, str(tmp_path / "secret.jpg")
            tar.addfile(info)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    tar_of(tmp_path / "y.tar", ("good.jpg", b"A"))
    source = open_source(str(tmp_path), need_captions=False)
    assert [source.image(i) for i in range(len(source))] == [b"A"]
    assert {name: reason.split(": ")[1].split(";")[0] for name, reason in reasons(source).items() if "/" in name} == {
        "x.tar/hard": "a link", "x.tar/soft": "a link",
        "x.tar/node": "not a regular file", "x.tar/pipe": "not a regular file",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst"])
def test_compressed_tars_are_named_and_not_opened(tmp_path: Path, name: str) -> None:
    tar_of(tmp_path / name, ("a.jpg", bytes(1 << 20)), format=tarfile.USTAR_FORMAT)
    for spec in (tmp_path, tmp_path / name):
        with pytest.raises(SourceError, match="a compressed tar; expected a plain"):
            open_source(str(spec))


def test_what_is_no_tar_is_named_and_costs_itself(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", ("a.jpg", b"A"))
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"<html>404</html>" * 100)
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    (tmp_path / "locked.tar").symlink_to("/nowhere/at-all.tar")
    source = open_source(str(tmp_path), need_captions=False)
    assert list(offered(source)) == ["a.tar/a"]
    assert set(reasons(source)) == {"empty.tar", "text.tar", "gz.tar", "locked.tar"}


def test_a_tar_cut_anywhere_keeps_what_is_whole_and_names_the_loss(tmp_path: Path) -> None:
    members = [
        m for key in "abcd" for m in ((f"{key}.jpg", key.encode() * 700), (f"{key}.txt", b"caption " + key.encode()))
    ]
    whole = tar_of(tmp_path / "x.tar", *members).read_bytes()
    full = offered(open_source(str(tmp_path / "x.tar")))
    nothing_left = []
    for cut in [*range(0, 9 * 512, 512), *range(100, len(whole), 997), 4 * 2560 - 1, 4 * 2560]:
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        try:
            source = open_source(str(tmp_path / "x.tar"))
        except SourceError as error:
            nothing_left.append(str(error))
            continue
        assert offered(source).items() <= full.items()
        assert [source.image(i) for i in range(len(source))] == [key.encode() * 700 for key in "abcd"[: len(source)]]
        if len(source) < 4:
            assert "cut short" in reasons(source)["x.tar"]
    assert all(re.search("cut short|damaged|an empty file|nothing but zero bytes", message) for message in nothing_left)


# ---- headers that lie


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(header(size=b"\xff" * 12), id="negative size"),
        pytest.param(header(size=b"\xff" * 10 + b"\xfc\x00"), id="size that leads back"),
        pytest.param(header(size=b"\x80" + b"\xff" * 11), id="huge size"),
        pytest.param(header(size=b"77777777777"), id="size beyond the file"),
        pytest.param(header(kind=b"x", size=b"77777777777"), id="pax header of 8 GB"),
        pytest.param(header(kind=b"L", size=b"77777777777"), id="name of 8 GB"),
        pytest.param(header(kind=b"x", size=b"\xff" * 12), id="pax header of negative size"),
        pytest.param(header(kind=b"L", size=b"00000000001") * 4000, id="names of names"),
        pytest.param(header(kind=b"S", isextended=b"\1"), id="sparse map without end"),
        pytest.param(b"\0" * 512 + header(), id="end before the start"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content + bytes(1024))
    assert all(member.problem for member in list_members(tmp_path / "x.tar").members)
    with pytest.raises(SourceError, match="offers no sample"):
        open_source(str(tmp_path / "x.tar"), need_captions=False)


def test_long_names_are_read_and_overlong_ones_refused(tmp_path: Path) -> None:
    long = "k" * 5_000
    source = open_source(str(tar_of(tmp_path / "x.tar", (f"{long}.jpg", b"A"))), need_captions=False)
    assert list(offered(source)) == [f"x.tar/{long}"]
    tar_of(tmp_path / "y.tar", ("k" * (MAX_HEADER_BYTES + 1), b"A"))
    assert "header of" in str(list_members(tmp_path / "y.tar").damage)


def test_a_size_that_pax_replaces_never_reaches_outside_the_tar(tmp_path: Path) -> None:
    for size in (-1024, 10**30, 700):
        record = b"%d size=%d\n"
        body = record % (len(record % (99, size)), size)
        pax = header(kind=b"x", size=b"%011o" % len(body)) + body.ljust(512, b"\0")
        (tmp_path / "x.tar").write_bytes(pax + header() + bytes(2048))
        for member in list_members(tmp_path / "x.tar").members:
            assert member.problem or 0 <= member.size <= 2048


NAMES = st.sampled_from(["a.jpg", "a.txt", "b.jpg", "b.json", "../c.jpg", "d", "e/f.png", "ä.jpg", "e/f.TXT", "."])


@FOLDERS
@given(members=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=12))
def test_every_key_is_offered_or_named(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    path = tar_of(tmp_path / "x.tar", *members)
    try:
        source = open_source(str(path), need_captions=False)
    except SourceError:
        return
    bodies = dict(members)
    for i in range(len(source)):
        key = source.name(i).removeprefix("x.tar/")
        assert source.image(i) in {bodies.get(f"{key}.jpg"), bodies.get(f"{key}.png")}
    keys = {name.split(".")[0] for name, _ in members if not name.startswith(".")}
    assert {name.removeprefix("x.tar/") for name in [*offered(source), *reasons(source)]} >= keys


@FOLDERS
@given(data=st.data())
def test_damaged_tars_raise_nothing_of_their_own(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    name = "n" * 120 + "é.jpg"
    path = tar_of(tmp_path / "x.tar", ("a.jpg", b"A" * 600), (name, b"B"), ("c.json", b'{"caption": "c"}'), format=kind)
    content = bytearray(path.read_bytes()[: 512 * 12])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        # With its checksum made right again, a damaged header is believed.
        start = 512 * data.draw(st.integers(0, 11))
        block = content[start : start + 512]
        block[148:156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(content)
    try:
        source = open_source(str(path), need_captions=False)
    except SourceError:
        return
    for i in range(len(source)):
        assert len(source.image(i)) <= len(content)


def test_a_tar_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", ("a.jpg", b"A" * 5000))
    source = open_source(str(path), need_captions=False)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputRejected, match="become shorter"):
        source.image(0)
    path.unlink()
    with pytest.raises(InputRejected, match="cannot be read"):
        source.image(0)
