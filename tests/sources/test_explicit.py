"""What is said about a source is done, or refused: it is never swallowed."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_folders import write

from kcache.config import SourceConfig, TrainConfig
from kcache.errors import ConfigError, SourceError
from kcache.report.cache import ReportConfig
from kcache.report.write import write_report
from kcache.sources import Source, open_source
from kcache_cli.verify import cache_verify


@pytest.mark.parametrize(
    ("spec", "given", "said"),
    [
        (
            "pairs",
            {"caption_column": "nosuch"},
            "--caption-column 'nosuch' was given, but means .* text file",
        ),
        ("pairs", {"image_column": "jpg"}, "--image-column 'jpg' was given, but means nothing"),
        (
            "folder",
            {"image_column": "picture"},
            r"column 'picture' \(--image-column\): metadata\.csv has no column 'picture'; found",
        ),
        ("folder", {"caption_column": "nosuch"}, "no column 'nosuch'; found file_name, text"),
        ("{0..1}.tar", {"follow_links": "/"}, "--follow-links '/' was given, but means nothing"),
        ("rows/x.parquet", {"caption_column": "nosuch"}, "no column 'nosuch'; found image, text"),
        ("rows", {"image_column": "nosuch"}, "no column 'nosuch'; found image, text"),
        ("owner/pictures", {"follow_links": "/"}, "--follow-links .* the Hub dataset owner/pictures"),
        ("{0..1}.tar", {"split": "test"}, "--split 'test' was given, but means nothing .* tars that are named"),
    ],
)
@pytest.mark.parametrize("need_captions", [True, False])
def test_a_setting_without_meaning_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, given: dict[str, str], said: str, need_captions: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {"pairs/a.jpg": "A", "pairs/a.txt": "a", "folder/a.jpg": "A"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "folder/metadata.csv").write_text("file_name,text\na.jpg,a\n")
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"image": [b"A"], "text": ["a"]}), tmp_path / "rows" / "x.parquet")
    with pytest.raises(SourceError, match=said):
        open_source(spec, SourceConfig(**given), need_captions=need_captions)


def test_what_says_how_a_source_is_read_is_refused_where_none_is_read(cache: str) -> None:
    for given in ({"caption_column": "x"}, {"source": "photos"}, {"source": "photos", "split": "test"}):
        with pytest.raises(ConfigError, match=r"would not be used: .*--against-online N or --repair"):
            cache_verify(cache, **given)
    with pytest.raises(ConfigError, match="--split and --follow-links say how a source is read; expected --source"):
        write_report(ReportConfig(path=cache, reading=SourceConfig(split="test", follow_links=".")))
    with pytest.raises(ConfigError, match="--image-column say how to read the source of --online"):
        TrainConfig(stage="prior", output_dir="run", image_column="x")


def tar_of(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return str(path)


def offered(source: Source) -> dict[str, tuple[str, ...]]:
    return {source.name(i): source.captions(i) for i in range(len(source))}


ABOUT = {
    "a": {"recaption": "a red fox on snow", "caption": "alt"},
    "b": {"recaption": ["one", "two"]},
    "c": {"caption": "alt"},
    "d": {"recaption": None},
}


@pytest.mark.parametrize("text", ["txt", "TXT"])
def test_a_caption_column_wins_over_text_members(tmp_path: Path, text: str) -> None:
    members = {
        name: content
        for key, about in ABOUT.items()
        for name, content in (
            (f"{key}.jpg", key.encode()),
            (f"{key}.{text}", b"alt text"),
            (f"{key}.json", json.dumps(about).encode()),
        )
    }
    place = tar_of(tmp_path / "x.tar", members)
    assert set(offered(open_source(place)).values()) == {("alt text",)}
    source = open_source(place, SourceConfig(caption_column="recaption"))
    assert offered(source) == {"x.tar/a": ("a red fox on snow",), "x.tar/b": ("one", "two")}
    assert source.description.endswith("captions from .json members, 'recaption'")
    told = {refusal.name: refusal.reason for refusal in source.refused}
    assert told["x.tar/c"].endswith(
        "no .json member with 'recaption' (its .json member holds caption: --caption-column)"
    )
    assert told["x.tar/d"].startswith("no caption")
    assert set(offered(open_source(place, SourceConfig(caption_column="txt"))).values()) == {("alt text",)}
    for need_captions in (True, False):
        with pytest.raises(SourceError, match=r"no caption column 'nosuch': .json members hold recaption, caption; "):
            open_source(place, SourceConfig(caption_column="nosuch"), need_captions=need_captions)


def test_an_image_column_names_the_member_that_is_the_image(tmp_path: Path) -> None:
    members = {"a.jpg": b"small", "a.png": b"large", "a.txt": b"a", "b.jpg": b"B", "b.txt": b"b"}
    place = tar_of(tmp_path / "x.tar", members)
    several = {refusal.name: refusal.reason for refusal in open_source(place).refused}
    assert several["x.tar/a"].startswith("several images among its members (jpg, png); name one with --image-column")
    source = open_source(place, SourceConfig(image_column="png"))
    assert (offered(source), source.image(0)) == ({"x.tar/a": ("a",)}, b"large")
    assert [refusal.reason for refusal in source.refused] == [
        "no .png among its members (jpg, txt); a key ends at the first dot"
    ]
    with pytest.raises(SourceError, match=r"offers no sample: .*no \.image among its members"):
        open_source(place, SourceConfig(image_column="image"))


@pytest.mark.parametrize("suffix", ["text", "caption", "Caption"])
def test_text_under_other_names_is_a_caption(tmp_path: Path, suffix: str) -> None:
    place = tar_of(tmp_path / "x.tar", {"a.jpg": b"A", f"a.{suffix}": b"a fox"})
    source = open_source(place)
    assert offered(source) == {"x.tar/a": ("a fox",)}
    assert source.description.endswith(f"captions from .{suffix.lower()} members")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "not a plain tar: .*Git LFS pointer"),
        (b"<html><title>404</title></html>", "not a plain tar: .*HTML page"),
        (b"\x1f\x8b\x08" + bytes(range(200)) * 5, "not a plain tar: it is a gzip archive"),
        (b"PAR1" + bytes(range(200)) * 5, "not a plain tar: it is a Parquet file"),
    ],
)
def test_a_tar_that_is_something_else_is_told_as_what_it_is(tmp_path: Path, head: bytes, said: str) -> None:
    (tmp_path / "x.tar").write_bytes(head)
    tar_of(tmp_path / "y.tar", {"a.jpg": b"A", "a.txt": b"a"})
    with pytest.raises(SourceError, match=said):
        open_source(str(tmp_path / "x.tar"))
    source = open_source(str(tmp_path))
    assert (len(source), [refusal.name for refusal in source.refused]) == (1, ["x.tar"])


@pytest.mark.parametrize("setting", ["split", "image_column", "caption_column", "follow_links"])
def test_a_flag_without_a_value_is_refused(tmp_path: Path, setting: str) -> None:
    write(tmp_path, {"a.jpg": b"A", "metadata.csv": "file_name,text\na.jpg,x"})
    with pytest.raises(SourceError, match=f"--{setting.replace('_', '-')}"):
        open_source(str(tmp_path), SourceConfig(**{setting: ""}))
