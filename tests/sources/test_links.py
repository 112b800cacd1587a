"""Links are followed where the tools that made them, or the user, say so; all others are named with what to type."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_folders import metadata, offered, reasons, write

from kcache.config import SourceConfig
from kcache.errors import InputRejected, SourceError
from kcache.sources import open_source


def snapshot(home: Path, kind: str, files: dict[str, str | bytes]) -> Path:
    """A repository as the Hub's client keeps it: links into its folder of blobs."""
    repository = home / "hub" / f"{kind}s--owner--name"
    revision = repository / "snapshots" / "5f0c"
    for number, (name, content) in enumerate(files.items()):
        write(repository / "blobs", {f"blob{number}": content})
        link = revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repository / "blobs" / f"blob{number}", link.parent))
    return revision


@pytest.mark.parametrize("kind", ["dataset", "model", "space"])
def test_snapshot_of_the_hub_is_read_like_the_files_it_links_to(tmp_path: Path, kind: str) -> None:
    rows = metadata({"file_name": "train/a.jpg", "text": "a"})
    folder = snapshot(tmp_path, kind, {"train/a.jpg": b"A", "b.jpg": b"B", "b.txt": "b", "metadata.jsonl": rows})
    source = open_source(str(folder))
    assert offered(source) == {"b.jpg": ("b",), "train/a.jpg": ("a",)}
    assert [source.image(i) for i in range(2)] == [b"B", b"A"]
    assert not source.refused
    assert offered(open_source(str(folder / "train"), need_captions=False)) == {"a.jpg": ()}


def test_tables_and_tars_of_a_snapshot_are_read(tmp_path: Path) -> None:
    image = pa.array(
        [{"bytes": None, "path": "pictures/a.jpg"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": image, "text": ["a"]}), tmp_path / "x.parquet")
    table = {"data/x.parquet": (tmp_path / "x.parquet").read_bytes(), "data/pictures/a.jpg": b"A"}
    folder = snapshot(tmp_path / "one", "dataset", table)
    assert open_source(str(folder / "data")).image(0) == b"A"
    write(tmp_path, {"in/1.jpg": b"B", "in/1.txt": "b"})
    shutil.make_archive(str(tmp_path / "x"), "tar", tmp_path / "in")
    folder = snapshot(tmp_path / "two", "dataset", {"0.tar": (tmp_path / "x.tar").read_bytes()})
    assert list(offered(open_source(str(folder))).values()) == [("b",)]


def test_all_revisions_at_once_are_no_source(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "dataset", {"a.jpg": b"A", "a.txt": "a"})
    with pytest.raises(SourceError, match=r"all revisions of a repository; give one of them: .*/snapshots/5f0c"):
        open_source(str(folder.parents[1]))


@pytest.mark.parametrize(
    ("store", "advice"), [(".git/annex/objects/f8/7e", "git annex get"), (".dvc/cache/files/md5/d4", "dvc pull")]
)
def test_store_of_the_own_repository_is_followed(tmp_path: Path, store: str, advice: str) -> None:
    write(tmp_path / "repository", {f"{store}/a": b"A", "photos/a.txt": "a", "photos/b.txt": "b"})
    folder = tmp_path / "repository/photos"
    (folder / "a.jpg").symlink_to(f"../{store}/a")
    (folder / "b.jpg").symlink_to(f"../{store}/b")
    source = open_source(str(folder))
    assert offered(source) == {"a.jpg": ("a",)}
    assert advice in reasons(source)["b.jpg"]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A source whose pictures lie elsewhere, one by one and as a folder."""
    write(tmp_path, {"pool/a.jpg": b"A", "pool/deep/b.jpg": b"B", "pool/deep/b.txt": "b", "secret/c.jpg": b"C"})
    folder = write(tmp_path / "data", {"a.txt": "a", "c.txt": "c", "own.jpg": b"O", "own.txt": "own"})
    (folder / "a.jpg").symlink_to("../pool/a.jpg")
    (folder / "c.jpg").symlink_to("../secret/c.jpg")
    (folder / "deep").symlink_to("../pool/deep")
    return folder


def test_other_links_are_refused_with_the_flag_to_type(linked: Path) -> None:
    source = open_source(str(linked))
    assert offered(source) == {"own.jpg": ("own",)}
    pool = linked.parent / "pool"
    assert reasons(source)["a.jpg"] == (
        f"link to '{pool}/a.jpg', outside the source; to follow it: --follow-links {pool}"
    )
    assert reasons(source)["deep"].endswith(f"to follow it: --follow-links {pool}/deep")


def test_links_into_the_folder_that_is_named_are_followed_and_no_others(linked: Path) -> None:
    source = open_source(str(linked), SourceConfig(follow_links=str(linked.parent / "pool")))
    assert offered(source) == {"a.jpg": ("a",), "deep/b.jpg": ("b",), "own.jpg": ("own",)}
    assert [source.image(i) for i in range(3)] == [b"A", b"B", b"O"]
    assert set(reasons(source)) == {"c.jpg", "c.txt"}


def test_followed_links_serve_metadata_and_tables_too(linked: Path) -> None:
    pool = SourceConfig(follow_links=str(linked.parent / "pool"))
    write(linked, {"metadata.jsonl": metadata({"file_name": "deep/b.jpg", "text": "row"}, {"file_name": "c.jpg"})})
    source = open_source(str(linked), pool)
    assert offered(source)["deep/b.jpg"] == ("row",)
    assert "--follow-links" in reasons(source)["metadata.jsonl line 2"]
    image = pa.array(
        [{"path": path} for path in ("a.jpg", "c.jpg")], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": image, "text": ["a", "c"]}), linked / "x.parquet")
    table = open_source(str(linked / "x.parquet"), SourceConfig())
    with pytest.raises(InputRejected, match="outside the source"):
        table.image(0)


def test_loops_and_folders_met_twice_are_named_and_read_once(tmp_path: Path) -> None:
    write(tmp_path, {"pool/x/a.jpg": b"A", "pool/x/a.txt": "a", "data/b.jpg": b"B", "data/b.txt": "b"})
    folder = tmp_path / "data"
    for name, target in {"one": "../pool", "two": "../pool/x", "up": "..", "self": "."}.items():
        (folder / name).symlink_to(target)
    (tmp_path / "pool/back").symlink_to("../pool")
    source = open_source(str(folder), SourceConfig(follow_links=str(tmp_path)))
    assert offered(source) == {"b.jpg": ("b",), "one/x/a.jpg": ("a",)}
    found = reasons(source)
    assert "a loop" in found["one/back"]
    assert "'the source itself': a loop" in found["self"]
    assert "read already, as 'one/x'" in found["two"]
    assert len(found) == 5


def test_links_inside_and_links_to_nothing_are_called_that(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"real/a.jpg": b"A", "real/a.txt": "a"})
    (folder / "linked").symlink_to("real")
    (folder / "gone.jpg").symlink_to("real/none.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    source = open_source(str(folder))
    assert offered(source) == {"real/a.jpg": ("a",)}
    assert reasons(source) == {
        "gone.jpg": "a dangling link: 'real/none.jpg' is not there; restore that, or remove the link",
        "linked": "a link to the folder 'real' of the source, which is read where it is",
        "loop.jpg": "the link 'loop.jpg' leads back to itself",
    }


def test_links_into_the_cache_of_the_hub_are_told_how_to_be_files(tmp_path: Path) -> None:
    revision = snapshot(tmp_path, "dataset", {"a.jpg": b"A", "a.txt": "a"})
    shutil.copytree(revision, tmp_path / "hub/copy/x/y", symlinks=True)
    folder = write(tmp_path / "local", {"b.jpg": b"B", "b.txt": "b"})
    (folder / "a.jpg").symlink_to(revision.resolve() / "a.jpg")
    (folder / "c.jpg").symlink_to(tmp_path / "hub/datasets--owner--name/blobs/gone")
    found = reasons(open_source(str(folder)))
    assert "hf download … --local-dir FOLDER" in found["a.jpg"]
    assert "a dangling link" in found["c.jpg"]
    assert "hf download … --local-dir FOLDER" in found["c.jpg"]


@pytest.mark.parametrize(("place", "message"), [("none", "nothing is there"), ("data/a.txt", "that is a file")])
def test_root_of_links_that_is_no_folder_is_refused(linked: Path, place: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(str(linked), SourceConfig(follow_links=str(linked.parent / place)))


def test_a_source_without_links_refuses_the_flag(tmp_path: Path) -> None:
    for spec in ("owner/name", str(tmp_path / "{0..9}.tar")):
        with pytest.raises(SourceError, match=r"--follow-links .* was given"):
            open_source(spec, SourceConfig(follow_links=str(tmp_path)))


def test_a_link_to_a_hidden_folder_of_the_source_is_followed(tmp_path: Path) -> None:
    write(tmp_path, {".store/a.jpg": b"A", ".store/a.txt": "a", ".store/b/c.jpg": b"C"})
    (tmp_path / "photos").symlink_to(".store")
    source = open_source(str(tmp_path))
    assert (offered(source), set(reasons(source))) == ({"photos/a.jpg": ("a",)}, {"photos/b/c.jpg"})
