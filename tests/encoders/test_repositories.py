"""Repositories are found whole, and their digests change exactly when what they compute may."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from kcache.encoders.repositories import (
    Repository,
    find_repository,
    tokenizer_digest,
    weights_digest,
)
from kcache.errors import ModelError
from kcache.store.digests import DigestMemo


@pytest.fixture
def prior(oracle: Path, tmp_path: Path) -> Repository:
    """A copy of the tiny prior, to be changed."""
    shutil.copytree(oracle / "prior", tmp_path / "prior")
    return find_repository(str(tmp_path / "prior"), None, ["image_encoder", "text_encoder", "tokenizer"])


def image_weights_digest(repository: Repository) -> str:
    with DigestMemo(repository.path / "digests.sqlite") as memo:
        return weights_digest(repository, "image_encoder", memo, rehash=True)


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
    with pytest.raises(ModelError, match="neither a local folder nor"):
        find_repository("models/prior/v2", None, ["image_encoder"])


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_configuration_is_refused(prior: Repository, content: str) -> None:
    (prior.path / "image_encoder" / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        prior.read("image_encoder")


def test_equal_weights_at_another_path_have_an_equal_digest(oracle: Path, prior: Repository) -> None:
    elsewhere = Repository(name="elsewhere", path=oracle / "prior", revision=None)
    assert image_weights_digest(prior) == image_weights_digest(elsewhere)
    assert len(image_weights_digest(prior)) == 64


def test_one_changed_weight_changes_the_digest(prior: Repository) -> None:
    before = image_weights_digest(prior)
    file = prior.path / "image_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["visual_projection.weight"][0, 0] += 1
    save_file(weights, file, {"format": "pt"})
    assert image_weights_digest(prior) != before


def in_shards(prior: Repository, names: dict[str, str]) -> None:
    """Split the image encoder's weights into two files with an index that says `names` for them."""
    folder = prior.path / "image_encoder"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {"a": dict(list(weights.items())[::2]), "b": dict(list(weights.items())[1::2])}
    for half, part in halves.items():
        save_file(part, folder / f"{half}.safetensors", {"format": "pt"})
    weight_map = {key: names[half] for half, part in halves.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_every_shard_counts(prior: Repository) -> None:
    in_shards(prior, {"a": "a.safetensors", "b": "b.safetensors"})
    before = image_weights_digest(prior)
    file = prior.path / "image_encoder" / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert image_weights_digest(prior) != before


@pytest.mark.parametrize("name", ["../../outside.safetensors", "missing.safetensors", "weights.bin"])
def test_an_index_names_only_safetensors_files_beside_it(prior: Repository, name: str) -> None:
    (prior.path / "image_encoder" / "weights.bin").touch()
    (prior.path.parent / "outside.safetensors").touch()
    in_shards(prior, {"a": "a.safetensors", "b": name})
    with pytest.raises(ModelError, match="names the shard"):
        image_weights_digest(prior)


def test_pickled_weights_are_refused(prior: Repository) -> None:
    folder = prior.path / "image_encoder"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*never unpickles"):
        image_weights_digest(prior)


def test_two_sets_of_weights_are_refused(prior: Repository) -> None:
    (prior.path / "image_encoder" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="2 sets of weights"):
        image_weights_digest(prior)


def test_the_second_digest_reads_no_weights(prior: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    memo = {}

    class Memo(DigestMemo):
        def digest(self, path: Path, part: str, compute: object, rehash: bool = False) -> bytes:
            if rehash or path not in memo:
                memo[path] = compute()  # type: ignore[operator]
            return memo[path]

    with Memo(prior.path / "digests.sqlite") as remembered:
        first = weights_digest(prior, "image_encoder", remembered)
        (prior.path / "image_encoder" / "model.safetensors").write_bytes(b"other")
        assert weights_digest(prior, "image_encoder", remembered) == first
        assert weights_digest(prior, "image_encoder", remembered, rehash=True) != first


def test_a_configuration_counts_where_it_describes_the_network(prior: Repository) -> None:
    before = prior.read("image_encoder").digest
    path = prior.path / "image_encoder" / "config.json"
    edit_json(path, torch_dtype="float16", transformers_version="4.0", _name_or_path="/home/x", architectures=None)
    assert prior.read("image_encoder").digest == before
    edit_json(path, hidden_act="quick_gelu")
    assert prior.read("image_encoder").digest != before


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json"])
def test_every_file_of_the_tokenizer_counts(prior: Repository, name: str) -> None:
    before = tokenizer_digest(prior)
    path = prior.path / "tokenizer" / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert tokenizer_digest(prior) != before


def test_the_tokenizer_configuration_counts_less_its_paths(prior: Repository) -> None:
    before = tokenizer_digest(prior)
    path = prior.path / "tokenizer" / "tokenizer_config.json"
    edit_json(path, name_or_path="/home/x")
    assert tokenizer_digest(prior) == before
    edit_json(path, model_max_length=64)
    assert tokenizer_digest(prior) != before


def test_a_tokenizer_without_vocabulary_is_refused(prior: Repository) -> None:
    for name in ("vocab.json", "tokenizer.json"):
        (prior.path / "tokenizer" / name).unlink()
    with pytest.raises(ModelError, match="no vocabulary"):
        tokenizer_digest(prior)
