"""The digest of weights is of the tensors, whatever files they lie in; what is no set of weights is said plainly."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

from kcache.disk.memo import DigestMemo
from kcache.encoders.repositories import Repository, find_repository
from kcache.encoders.weights import weights_digest
from kcache.errors import ModelError

FILE = "model.safetensors"


@pytest.fixture
def prior(oracle: Path, tmp_path: Path) -> Repository:
    """A copy of the tiny prior, to be changed."""
    shutil.copytree(oracle / "prior", tmp_path / "prior")
    return find_repository(str(tmp_path / "prior"), None, ["image_encoder", "text_encoder", "tokenizer"])


def image_weights_digest(repository: Repository, known: str | None = None) -> str:
    with DigestMemo(repository.path / "digests.sqlite") as memo:
        return weights_digest(repository, "image_encoder", memo, rehash=True, known=known)


def test_equal_weights_at_another_path_have_an_equal_digest(oracle: Path, prior: Repository) -> None:
    elsewhere = Repository(name="elsewhere", path=oracle / "prior", revision=None)
    assert image_weights_digest(prior) == image_weights_digest(elsewhere)
    assert len(image_weights_digest(prior)) == 64


def test_the_digest_is_that_of_the_file_as_save_pretrained_writes_it(prior: Repository) -> None:
    folder = prior.path / "image_encoder"
    assert image_weights_digest(prior) == hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    dtypes = ("bool", "uint8", "int8", "int16", "float16", "bfloat16", "int32", "float32", "float64", "int64")
    odd = {
        f"{'éa' if i % 2 else 'z'}{i}": torch.ones(i, 2, dtype=getattr(torch, dtype)) for i, dtype in enumerate(dtypes)
    }
    save_tensors(odd | {"none": torch.ones(0, 3), "one": torch.tensor(1.0)}, folder / FILE, {"format": "pt"})
    before = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    with_other_metadata(folder)
    assert hashlib.sha256((folder / FILE).read_bytes()).hexdigest() != before
    assert image_weights_digest(prior) == before


def with_other_metadata(folder: Path) -> None:
    """The same tensors, their header in another order, with other metadata, their bytes the other way round."""
    content = (folder / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data, moved = b"", {"__metadata__": {"format": "pt", "from": "another tool"}}
    for name, about in reversed(header.items()):
        begin, end = about["data_offsets"]
        moved[name] = about | {"data_offsets": [len(data), len(data) + end - begin]}
        data += content[8 + length + begin : 8 + length + end]
    text = json.dumps(moved, indent=1).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)


def in_shards(folder: Path, names: dict[str, str] | None = None) -> None:
    """Split weights into two files with an index that says `names` for them."""
    names = names or {"a": "a.safetensors", "b": "b.safetensors"}
    weights = load_file(folder / FILE)
    (folder / FILE).unlink()
    halves = {"a": dict(list(weights.items())[::2]), "b": dict(list(weights.items())[1::2])}
    for half, part in halves.items():
        save_file(part, folder / f"{half}.safetensors", {"format": "pt"})
    weight_map = {key: names[half] for half, part in halves.items() for key in part}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def under_the_other_name(folder: Path) -> None:
    (folder / FILE).rename(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("change", [with_other_metadata, in_shards, under_the_other_name])
def test_the_same_tensors_in_other_files_are_the_same_weights(
    prior: Repository, change: Callable[[Path], None]
) -> None:
    before = image_weights_digest(prior)
    change(prior.path / "image_encoder")
    assert image_weights_digest(prior) == before


def test_a_digest_of_files_that_is_on_record_stays(prior: Repository) -> None:
    folder = prior.path / "image_encoder"
    with_other_metadata(folder)
    of_file = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    canonical = image_weights_digest(prior)
    assert of_file != canonical
    assert image_weights_digest(prior, known=of_file) == of_file
    assert image_weights_digest(prior, known=canonical) == image_weights_digest(prior, known="0" * 64) == canonical


@pytest.mark.parametrize("shards", [False, True])
def test_one_changed_weight_its_name_or_its_dtype_changes_the_digest(prior: Repository, shards: bool) -> None:
    folder = prior.path / "image_encoder"
    found = {image_weights_digest(prior)}
    weights = load_file(folder / FILE)
    name, changed = "visual_projection.weight", weights["visual_projection.weight"].copy()
    changed[0, 0] += 1
    others = {key: value for key, value in weights.items() if key != name}
    for other in ({name: changed}, {"another.weight": weights[name]}, {name: weights[name].astype("float16")}, {}):
        for file in folder.glob("*safetensors*"):
            file.unlink()
        save_file(others | other, folder / FILE, {"format": "pt"})
        if shards:
            in_shards(folder)
        found.add(image_weights_digest(prior))
    assert len(found) == 5


@pytest.mark.parametrize("name", ["../../outside.safetensors", "missing.safetensors", "weights.bin"])
def test_an_index_names_only_safetensors_files_beside_it(prior: Repository, name: str) -> None:
    (prior.path / "image_encoder" / "weights.bin").touch()
    (prior.path.parent / "outside.safetensors").touch()
    in_shards(prior.path / "image_encoder", {"a": "a.safetensors", "b": name})
    with pytest.raises(ModelError, match="names the shard"):
        image_weights_digest(prior)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 667696\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LFS, "a Git LFS pointer.*git lfs pull"),
        ("", "an empty file"),
        ("<!DOCTYPE html><html><title>404</title></html>", "HTML|web page"),
        ("\0" * 5000, "nothing but zero bytes"),
        ("half a file of something", "is no whole safetensors file|it is"),
    ],
    ids=["pointer", "empty", "page", "zeros", "text"],
)
@pytest.mark.parametrize("shards", [False, True])
def test_what_the_file_plainly_is_instead_is_said(prior: Repository, content: str, said: str, shards: bool) -> None:
    folder = prior.path / "image_encoder"
    if shards:
        in_shards(folder)
    (folder / ("b.safetensors" if shards else FILE)).write_text(content)
    with pytest.raises(ModelError, match=said):
        image_weights_digest(prior)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_quantized_weights_are_refused(prior: Repository, dtype: str) -> None:
    coded = {"a.weight": torch.ones(2, 2).to(getattr(torch, dtype)), "a.position_ids": torch.arange(3)}
    save_tensors(coded, prior.path / "image_encoder" / FILE)
    with pytest.raises(ModelError, match=r"has quantized weights \(a.weight is [IUF]8.*, and 0 more\)"):
        image_weights_digest(prior)


def test_a_file_that_was_cut_is_refused(prior: Repository) -> None:
    path = prior.path / "image_encoder" / FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is no whole safetensors file .*lies beyond its end"):
        image_weights_digest(prior)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["pytorch_model.bin"], r"pytorch_model\.bin.*never unpickles"),
        (["model.fp16.safetensors"], r"half precision, model\.fp16\.safetensors.*name it model\.safetensors$"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "half precision, "),
        (["model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors alone"),
        ([], "fetch or export the repository again, with its weights as safetensors"),
        (
            [FILE, f"{FILE}.index.json"],
            "2 sets of weights.*move all but the right one away: model.safetensors or model",
        ),
        ([FILE, "diffusion_pytorch_model.safetensors"], "2 sets of weights.*move all but the right one away"),
    ],
    ids=str,
)
def test_where_there_is_not_one_set_the_advice_fits_what_there_is(
    prior: Repository, names: list[str], said: str
) -> None:
    folder = prior.path / "image_encoder"
    (folder / FILE).unlink()
    for name in names:
        (folder / name).touch()
    with pytest.raises(ModelError, match=said):
        image_weights_digest(prior)


def test_a_download_that_was_broken_off_is_called_so(prior: Repository) -> None:
    folder = prior.path / "image_encoder"
    (folder / FILE).unlink()
    snapshot = Repository(name="o/prior", path=prior.path, revision="0" * 40)
    with pytest.raises(ModelError, match=r"its download is unfinished, .*fetch it again, online"):
        image_weights_digest(snapshot)
    partial = prior.path / ".cache/huggingface/download/image_encoder/x.incomplete"
    partial.parent.mkdir(parents=True)
    partial.touch()
    with pytest.raises(ModelError, match="its download is unfinished"):
        image_weights_digest(prior)
    (folder / FILE).symlink_to("../../blobs/0")
    with pytest.raises(ModelError, match=r"model\.safetensors is a link to \.\./\.\./blobs/0, where nothing is"):
        image_weights_digest(prior)


def test_the_second_digest_reads_no_weights(prior: Repository) -> None:
    remembered: dict[tuple[Path, str], bytes] = {}

    class Memo(DigestMemo):
        def digest(self, path: Path, part: str, compute: Callable[[], bytes], rehash: bool = False) -> bytes:
            if rehash or (path, part) not in remembered:
                remembered[path, part] = compute()
            return remembered[path, part]

    for shards in (False, True):
        folder = prior.path / "image_encoder"
        if shards:
            in_shards(folder)
        with Memo(prior.path / "digests.sqlite") as memo:
            first = weights_digest(prior, "image_encoder", memo)
            kept = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
            for file in kept:
                file.write_bytes(b"other")
            assert weights_digest(prior, "image_encoder", memo) == first
            with pytest.raises(ModelError):
                weights_digest(prior, "image_encoder", memo, rehash=True)
            for file, content in kept.items():
                file.write_bytes(content)
