"""What a dataset of the Hub may name on this machine."""

import json
import zipfile
from pathlib import Path

import datasets
import pytest

from kcache.config import SourceConfig
from kcache.disk.memo import DigestMemo
from kcache.errors import InputRejected
from kcache.sources import open_source


def hub_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the folder what `load_dataset` loads for any id."""
    load, cache = datasets.load_dataset, str(folder.parent / "cache")

    def load_local(name: str, *, split: str, keep_in_memory: bool) -> datasets.Dataset:
        return load(str(folder), split=split, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load_local)


def test_zipped_imagefolder_is_read_wherever_its_zip_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    with zipfile.ZipFile(tmp_path / "repository/x.zip", "w") as archive:
        archive.writestr("a.jpg", b"A")
        archive.writestr("metadata.jsonl", '{"file_name": "a.jpg", "text": "a"}')
    hub_repository(tmp_path / "repository", monkeypatch)
    source = open_source("owner/pictures")
    assert (source.captions(0), source.image(0)) == (("a",), b"A")


@pytest.mark.parametrize("path", ["{}/secret.jpg", "zip://secret.jpg::{}/secret.zip"])
def test_metadata_of_an_imagefolder_cannot_name_files_of_this_machine(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.writestr("secret.jpg", b"secret")
    (tmp_path / "repository/a.jpg").write_bytes(b"A")
    # Of both names of the column `datasets` takes the latter, as it stands.
    row = {"file_name": "a.jpg", "text": "a", "image": {"path": path.format(tmp_path), "bytes": None}}
    (tmp_path / "repository/metadata.jsonl").write_text(json.dumps(row))
    hub_repository(tmp_path / "repository", monkeypatch)
    with pytest.raises(InputRejected, match="leads out of the source"):
        open_source("owner/pictures").image(0)


def test_columns_of_control_images_cannot_name_zips_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.writestr("secret.jpg", b"secret")
    (tmp_path / "repository/a.jpg").write_bytes(b"A")
    path = f"zip://secret.jpg::{tmp_path}/secret.zip"
    row = {"file_name": "a.jpg", "text": "a", "depth": {"path": path, "bytes": None}}
    (tmp_path / "repository/metadata.jsonl").write_text(json.dumps(row))
    hub_repository(tmp_path / "repository", monkeypatch)
    source = open_source("owner/pictures", SourceConfig(hint_column=("far=depth",)))
    with DigestMemo() as memo, pytest.raises(InputRejected, match="leads out of the source"):
        source.control_keys(0, memo, False)
    with pytest.raises(InputRejected, match="leads out of the source"):
        source.control(0, "hint-far")
