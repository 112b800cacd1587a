"""Repositories are found whole, and their digests change exactly when what they compute may."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from kcache.encoders.repositories import Repository, find_repository
from kcache.errors import ModelError


@pytest.fixture
def prior(oracle: Path, tmp_path: Path) -> Repository:
    """A copy of the tiny prior, to be changed."""
    shutil.copytree(oracle / "prior", tmp_path / "prior")
    return find_repository(str(tmp_path / "prior"), None, ["image_encoder", "text_encoder", "tokenizer"])


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_needs_no_revision_and_no_network(oracle: Path) -> None:
    name = str(oracle / "prior")
    repository = find_repository(name, "main", ["image_encoder", "image_processor", "tokenizer", "scheduler"])
    assert repository == Repository(name=name, path=oracle / "prior", revision=None)
    assert repository.read("image_encoder").values["projection_dim"] == 32
    assert repository.read("image_processor").values["resample"] == 3


def test_a_missing_component_is_named_with_what_is_there(oracle: Path) -> None:
    with pytest.raises(ModelError, match=r"no movq/config\.json; found the folders image_encoder, image_processor"):
        find_repository(str(oracle / "prior"), None, ["image_encoder", "movq"])


def test_a_hub_repository_is_pinned_to_its_commit(
    oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    shutil.copytree(oracle / "decoder", snapshot)
    asked = {}

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    repository = find_repository("someone/kandinsky", "v1", ["movq"])
    assert repository == Repository(name="someone/kandinsky", path=snapshot, revision="0123abcd")
    assert (asked["repo_id"], asked["revision"]) == ("someone/kandinsky", "v1")
    assert asked["allow_patterns"] == ["*.json", "movq/*.safetensors", "movq/*.txt"]


def test_a_hub_repository_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **options: object) -> str:
        raise LocalEntryNotFoundError("offline, and not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ModelError, match=r"someone/kandinsky is neither .*offline, and not in the cache.*give a folder"
    ):
        find_repository("someone/kandinsky", None, ["movq"])


def test_a_mistyped_path_is_no_repository() -> None:
    with pytest.raises(ModelError, match="is a folder that is not there"):
        find_repository("models/prior/v2", None, ["image_encoder"])


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_configuration_is_refused(prior: Repository, content: str) -> None:
    (prior.path / "image_encoder" / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        prior.read("image_encoder")


def test_a_configuration_counts_where_it_describes_the_network(prior: Repository) -> None:
    before = prior.read("image_encoder").digest
    path = prior.path / "image_encoder" / "config.json"
    edit_json(path, torch_dtype="float16", transformers_version="4.0", _name_or_path="/home/x", architectures=None)
    assert prior.read("image_encoder").digest == before
    edit_json(path, hidden_act="quick_gelu")
    assert prior.read("image_encoder").digest != before
