"""The weights of a network: which files hold them, and their digest, which is the same in whatever files they are."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kcache.config import Say, unheard
from kcache.disk.memo import DigestMemo
from kcache.encoders.repositories import FINISH, Repository
from kcache.errors import ModelError
from kcache.foreign import reason
from kcache.plainly import plainly_at
from kcache.store.recipe import json_digest

_STEMS = ("model", "diffusion_pytorch_model")
"""transformers' and diffusers' names for the weights of a component."""
_LARGE_BYTES = 1_000_000_000
"""Files above this take some seconds to digest."""
_BLOCK_BYTES = 1 << 24
_LARGEST_HEADER = 100_000_000
_DTYPES = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32",
    "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
"""As safetensors ranks them: the tensors of a later one stand first in a file."""
_FLOATING = ("F16", "BF16", "F32", "F64")


class _Tensor(NamedTuple):
    """A tensor in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    """Where its bytes begin in the file."""
    size: int


def weights_digest(
    repository: Repository,
    component: str,
    memo: DigestMemo,
    rehash: bool = False,
    say: Say = unheard,
    *,
    known: str | None = None,
) -> str:
    """sha256 (hex) of the weights that from_pretrained would load, as save_pretrained writes them into one file.

    It is of the tensors' names, dtypes, shapes and bytes, and the same in one file or several, in whatever order and
    with whatever metadata. Earlier, weights were named by their files: where that gives `known`, a digest that is on
    record, it stays. `say` is told of large files that are not remembered and have to be read. Raises ModelError when
    there are no such files.
    """
    index, files = weights_files(repository, component)

    def of_file(path: Path) -> bytes:
        size = path.stat().st_size
        if size > _LARGE_BYTES:
            say(f"digesting the weights of {component}, {size / 1e9:.1f} GB: once, as long as they stay unchanged")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    found = {path.name: memo.digest(path, "sha256", partial(of_file, path), rehash) for path in files}
    of_files = found[files[0].name].hex() if index is None else json_digest({n: d.hex() for n, d in found.items()})
    if of_files == known:
        return of_files
    part = "tensors" if index is None else f"tensors of {of_files}"
    return memo.digest(index or files[0], part, partial(_of_tensors, files, found), rehash).hex()


def _of_tensors(files: Sequence[Path], digests: Mapping[str, bytes]) -> bytes:
    """sha256 of the one file that save_pretrained would write of the tensors in `files`, whose digests are given."""
    tensors = [tensor for path in files for tensor in _tensors(path)]
    _check_floating(files, tensors)
    tensors.sort(key=lambda tensor: (-_DTYPES.index(tensor.dtype), tensor.name.encode()))
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ModelError(f"{files[0].parent} has a tensor twice, in two shards; fetch the weights again")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, _, _, size in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    if len(files) == 1:
        with files[0].open("rb") as file:
            if file.read(len(head)) == head:
                return digests[files[0].name]
    digest = hashlib.sha256(head)
    for block in _blocks(tensors):
        digest.update(block)
    return digest.digest()


def _check_floating(files: Sequence[Path], tensors: Iterable[_Tensor]) -> None:
    """Raise ModelError for quantized weights: libraries would take their codes for values, and say nothing."""
    coded = [each for each in tensors if each.name.endswith((".weight", ".bias")) and each.dtype not in _FLOATING]
    if coded:
        name, dtype, *_ = coded[0]
        raise ModelError(
            f"{files[0].parent} has quantized weights ({name} is {dtype}, and {len(coded) - 1} more); expected "
            "floating point; give the repository that they were made from"
        )


def _tensors(path: Path) -> list[_Tensor]:
    """The tensors of a safetensors file; raises ModelError for what is none."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError("it has no header of tensors")
            header = json.loads(file.read(length))
        tensors = []
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + int(offset) for offset in about["data_offsets"])
                tensors.append(_Tensor(name, about["dtype"], tuple(about["shape"]), path, begin, end - begin))
                if about["dtype"] not in _DTYPES or not 8 + length <= begin <= end <= size:
                    raise ValueError(f"{name} lies beyond its end, or is of an unknown dtype")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if (what := plainly_at(path)) and "safetensors" not in what:  # as one that was cut still begins
            raise ModelError(f"{path} holds no weights: it is {what}") from error
        raise ModelError(
            f"{path} is no whole safetensors file ({reason(error)}); expected weights as save_pretrained writes them; "
            "fetch the file again"
        ) from error
    return tensors


def _blocks(tensors: Iterable[_Tensor]) -> Iterator[bytes]:
    for tensor in tensors:
        with tensor.path.open("rb") as file:
            file.seek(tensor.begin)
            left = tensor.size
            while left and (block := file.read(min(left, _BLOCK_BYTES))):
                left -= len(block)
                yield block


def weights_files(repository: Repository, component: str) -> tuple[Path | None, list[Path]]:
    """The index of the shards, if there are several, and the files; raises ModelError when there are no such files."""
    folder = repository.path / component
    whole = [folder / f"{stem}.safetensors" for stem in _STEMS]
    indexes = [folder / f"{stem}.safetensors.index.json" for stem in _STEMS]
    found = [path for path in whole + indexes if path.is_file()]
    if len(found) != 1:
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        listed = ", ".join(names) if folder.is_dir() else "no such folder"
        raise ModelError(
            f"{folder} has {len(found)} sets of weights (found {listed or 'an empty folder'}); expected exactly one of "
            f"{', '.join(path.name for path in whole)} or the index of one in shards; "
            f"{_advice(repository, [path.name for path in found], folder, names)}"
        )
    return (found[0], _shards(repository, found[0])) if found[0] in indexes else (None, found)


def _advice(repository: Repository, sets: Sequence[str], folder: Path, names: Sequence[str]) -> str:
    """What to do where there is not one set of weights among the `names` in a folder, by what there is."""
    if sets:
        return f"move all but the right one away: {' or '.join(sets)}"
    if lost := [name for name in names if not (folder / name).exists()]:
        return f"{lost[0]} is a link to {(folder / lost[0]).readlink()}, where nothing is: put that back"
    if halves := [name for name in names if ".fp16." in name and ".safetensors" in name]:
        return (
            f"there is only the variant in half precision, {halves[0]}: fetch the one without fp16 in its name, or, if "
            f"half precision is what you want, name it {halves[0].replace('.fp16', '')}"
        )
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in names):
        return "convert pickled weights (.bin) with save_pretrained: kcache never unpickles"
    if repository.unfinished:
        return FINISH
    if others := [name for name in names if ".safetensors" in name]:
        return f"{others[0]} alone is not expected there: name it as expected, or fetch the repository again"
    return "fetch or export the repository again, with its weights as safetensors"


def _shards(repository: Repository, index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = plainly_at(index)
        raise ModelError(
            f"{index} cannot be read as an index of shards ({error!r}{f'; it is {what}' if what else ''}); fetch the "
            "weights again"
        ) from error
    for name in names:
        # A name is not a path, and nothing but safetensors is opened.
        if Path(name).name != name or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            do = FINISH if repository.unfinished else "fetch the weights again"
            raise ModelError(f"{index} names the shard {name!r}; expected a safetensors file beside it; {do}")
    return [index.parent / name for name in names]
