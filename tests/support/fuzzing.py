"""Damaged and hostile files, by chance: whatever reads them may only succeed or raise a KcacheError.

    python tests/support/fuzzing.py --cases 100000

Each case damages one small file: bytes are flipped, cut, added or moved; or values of JSON, of an array or of a column
become others of any type and size, and the digests that cover them are made right again, as a forger would. Then the
file is read the way the library reads it. Prints the number of cases per file and outcome; ends at the first leak.
"""

import argparse
import collections
import copy
import hashlib
import io
import json
import random
import shutil
import tarfile
import tempfile
import tokenize
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c
from measuring.synthetic import write_synthetic_cache

from kcache import Cache
from kcache.build.plan import Plan, freeze_plan, open_plan, plan_table
from kcache.disk.memo import DigestMemo
from kcache.errors import KcacheError
from kcache.sources import open_source
from kcache.store.formats.parts import PARTS, list_parts
from kcache.store.index import stored_rows
from kcache.store.recipe import canonical_json
from kcache.store.shards import read_commits

HOSTILE = [
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 1e308, -0.5, "", "0", "..", "../../x",
    "/etc/passwd", "a/b", "x" * 5000, "\0", "\ud800", "é", [], [[]], {}, {"": None}, [0] * 50, "float64", "object", "O",
]  # fmt: skip


class Lab:
    """A small cache with a frozen plan, and a tar of pictures: files to damage, put right again after each case."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        write_synthetic_cache(self.cache, 6, dim=2, latent_side=2, rows_per_shard=4, captions=2)
        recipes = Cache.open(self.cache).recipes
        keys = [bytes([i]) * 16 for i in range(5)]
        tables = [plan_table(r, keys, (), (), rows_per_shard=2, first_shard=3) for r in recipes.values()]
        freeze_plan(self.cache, Plan(tables=tuple(tables)))
        self.tar = folder / "pictures.tar"
        self.tar.write_bytes(_tar_of_pictures())
        self._before: dict[Path, bytes | None] = {}

    def write(self, path: Path, content: bytes) -> None:
        """Change a file, until `restore`."""
        self._before.setdefault(path, path.read_bytes() if path.exists() else None)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    def restore(self) -> None:
        """Put every file back as it was."""
        for path, content in self._before.items():
            if content is not None:
                path.write_bytes(content)
            elif path.parent.name.startswith("index-"):
                shutil.rmtree(path.parent, ignore_errors=True)
            else:
                path.unlink()
        self._before.clear()


def _tar_of_pictures() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, text in (("a.jpg", b"picture"), ("a.txt", b"caption"), ("é" * 60 + ".jpg", b"2"), ("b.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return content.getvalue()


# Damage


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """`content` with one to four accidents."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(damaged) + 1)
        match rng.randrange(6):
            case 0 if place < len(damaged):
                damaged[place] ^= 1 << rng.randrange(8)
            case 1:
                damaged[place : place + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
            case 2:
                del damaged[place : place + rng.choice((1, 16, 512, 10**6))]
            case 3:
                damaged[place:place] = rng.choice((b"\0" * 64, b"[" * 3000, b"9" * 5000, b"\xff", b'"', b"-", b"e999"))
            case 4:
                other = rng.randrange(len(damaged) + 1)
                damaged[place:place] = damaged[other : other + rng.randint(1, 600)]
            case 5:
                digits = [i for i, byte in enumerate(damaged) if 48 <= byte < 58]
                if digits:
                    damaged[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(damaged)


def damaged_json(rng: random.Random, value: Any) -> Any:
    """`value` with one to three of its parts replaced, removed, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = [place for place in _places(value) if place[1] != "digest"]
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(4):
            case 0 | 1:
                holder[key] = copy.deepcopy(rng.choice(HOSTILE))
            case 2:
                del holder[key]
            case 3:
                other, other_key = rng.choice(places)
                holder[key] = copy.deepcopy(other[other_key]) if _has(other, other_key) else None
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in items for place in [(value, key), *_places(part)]]


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def damaged_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """`array` with values replaced by any bits, or of another length, dtype or shape."""
    match rng.randrange(5):
        case 0:
            return array[: rng.randrange(len(array) + 1)]
        case 1:
            return np.concatenate([array, array[: rng.randint(0, len(array))]])
        case 2:
            return rng.choice([array[None], np.zeros(len(array), "<f8"), np.zeros((), array.dtype), array.byteswap()])
        case _:
            content = bytearray(array.tobytes())
            for _ in range(rng.randint(1, 3)):
                place = rng.randrange(len(content))
                content[place : place + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\x80", rng.randbytes(4))
                )
            size = array.dtype.itemsize
            return np.frombuffer(bytes(content[: len(content) // size * size]), array.dtype)


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _sealed(body: dict[str, Any]) -> bytes:
    """JSON whose digest is right."""
    body = {key: value for key, value in body.items() if key != "digest"}
    return json.dumps({**body, "digest": hashlib.sha256(canonical_json(body).encode()).hexdigest()}).encode()


# What is damaged, and how it is read


def use_cache(cache: Path) -> None:
    """Open a cache and read all of it."""
    opened = Cache.open(cache)
    fields = [field.name for recipe in opened.recipes.values() for field in recipe.fields]
    numbers = np.arange(len(opened))[:8]
    opened.read(numbers, fields, drop_image=numbers % 2 == 0)
    opened.resident_bytes(fields)
    opened.make_resident(fields)
    opened.where("tokens > 0 and n_captions > 0 and 'x' not in name and width >= height")
    repr(opened)


def damage_manifest(rng: random.Random, lab: Lab) -> Callable[[], object]:
    path = lab.cache / "manifest.json"
    content = path.read_bytes()
    if rng.random() < 0.3:
        lab.write(path, damaged_bytes(rng, content))
    else:
        lab.write(path, _sealed(damaged_json(rng, json.loads(content))))
    return lambda: use_cache(lab.cache)


def damage_index(rng: random.Random, lab: Lab) -> Callable[[], object]:
    manifest = json.loads((lab.cache / "manifest.json").read_bytes())
    paths = sorted(lab.cache.glob("index-*/*.npy"))
    contents = {path.name: path.read_bytes() for path in paths}
    name = rng.choice(sorted(contents))
    if rng.random() < 0.4:
        contents[name] = damaged_bytes(rng, contents[name])
    else:
        contents[name] = npy(damaged_array(rng, np.load(io.BytesIO(contents[name]))))
    with tempfile.TemporaryDirectory() as made:
        for path in paths:
            Path(made, path.name).write_bytes(contents[path.name])
        try:
            contents[PARTS] = list_parts(Path(made), [path.stem for path in paths])
        except (ValueError, SyntaxError, tokenize.TokenError, TypeError, LookupError, MemoryError):  # it is no array
            contents[PARTS] = paths[0].with_name(PARTS).read_bytes()
    manifest["index_digest"] = hashlib.sha256(contents[PARTS]).hexdigest()
    for name, content in contents.items():
        lab.write(lab.cache / f"index-{manifest['index_digest'][:16]}" / name, content)
    lab.write(lab.cache / "manifest.json", _sealed(manifest))
    return lambda: use_cache(lab.cache)


def damage_samples(rng: random.Random, lab: Lab) -> Callable[[], object]:
    manifest = json.loads((lab.cache / "manifest.json").read_bytes())
    [path] = lab.cache.glob("samples-*.parquet")
    content = path.read_bytes()
    if rng.random() < 0.6:
        content = damaged_bytes(rng, content)
    else:
        table = pq.read_table(io.BytesIO(content))
        column = rng.choice(table.column_names)
        others = [
            pa.nulls(6),
            pa.array(["x"] * 6),
            pa.array([1.5] * 6),
            pa.array([[1]] * 6),
            table[rng.choice(table.column_names)],
        ]
        table = table.set_column(table.column_names.index(column), column, rng.choice(others))
        buffer = io.BytesIO()
        pq.write_table(table.slice(0, rng.choice((6, 6, 3, 0))), buffer)
        content = buffer.getvalue()
    manifest["samples_file_digest"] = hashlib.sha256(content).hexdigest()
    lab.write(lab.cache / f"samples-{manifest['samples_file_digest'][:16]}.parquet", content)
    lab.write(lab.cache / "manifest.json", _sealed(manifest))
    return lambda: use_cache(lab.cache)


def damage_rows(rng: random.Random, lab: Lab) -> Callable[[], object]:
    path = rng.choice(sorted(path for path in lab.cache.glob("*-*/0*/*/c/**/*") if path.is_file()))
    lab.write(path, damaged_bytes(rng, path.read_bytes()))
    return lambda: use_cache(lab.cache)


def damage_commit(rng: random.Random, lab: Lab) -> Callable[[], object]:
    path = rng.choice(sorted(lab.cache.glob("*-*/0*.json")))
    content = path.read_bytes()
    if rng.random() < 0.3:
        lab.write(path, damaged_bytes(rng, content))
    else:
        lab.write(path, _sealed(damaged_json(rng, json.loads(content))))
    return lambda: use_shards(lab.cache)


def damage_side_file(rng: random.Random, lab: Lab) -> Callable[[], object]:
    record = rng.choice(sorted(lab.cache.glob("*-*/0*.json")))
    [path] = record.parent.glob(f"{record.stem}-*.rows.npy")
    content = path.read_bytes()
    if rng.random() < 0.4:
        content = damaged_bytes(rng, content)
    else:
        content = npy(damaged_array(rng, np.load(io.BytesIO(content))))
    lab.write(path, content)
    commit = json.loads(record.read_bytes())
    for file in commit["files"]:
        if file["path"] == path.name:
            file |= {"bytes": len(content), "crc32c": crc32c(content)}
    lab.write(record, _sealed(commit))
    return lambda: use_shards(lab.cache)


def use_shards(cache: Path) -> None:
    """Read what every table has committed."""
    for recipe in Cache.open(cache).recipes.values():
        folder = cache / recipe.directory
        stored_rows(folder, read_commits(folder, recipe), recipe)


def damage_plan(rng: random.Random, lab: Lab) -> Callable[[], object]:
    path = rng.choice(sorted(path for path in lab.cache.glob("plans/*/*") if path.is_file()))
    content = path.read_bytes()
    if rng.random() < 0.4:
        content = damaged_bytes(rng, content)
    elif path.suffix == ".npy":
        content = npy(damaged_array(rng, np.load(io.BytesIO(content))))
    else:
        content = json.dumps(damaged_json(rng, json.loads(content))).encode()
    lab.write(path, content)
    return lambda: open_plan(lab.cache)


def damage_tar(rng: random.Random, lab: Lab) -> Callable[[], object]:
    content = bytearray(damaged_bytes(rng, lab.tar.read_bytes()))
    for start in range(0, len(content) - 511, 512):
        header = content[start : start + 512]
        if header[257:262] == b"ustar":  # a header with its checksum right
            header[148:156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    lab.write(lab.tar, bytes(content))
    return lambda: use_source(lab.tar)


def use_source(path: Path) -> None:
    """Read every picture that a source offers."""
    with DigestMemo(path.with_suffix(".sqlite")) as memo:
        source = open_source(str(path))
        for i in range(len(source)):
            source.name(i), source.captions(i)
            try:
                source.image_key(i, memo, True)
                source.image(i)
            except KcacheError:
                continue


TARGETS: dict[str, Callable[[random.Random, Lab], Callable[[], object]]] = {
    "manifest": damage_manifest,
    "index": damage_index,
    "samples": damage_samples,
    "rows": damage_rows,
    "commit record": damage_commit,
    "side file": damage_side_file,
    "plan": damage_plan,
    "source tar": damage_tar,
}


def run_case(target: str, seed: int, lab: Lab) -> str:
    """One case; returns what came of it: "read", or the name of the KcacheError. Other exceptions come through."""
    try:
        use = TARGETS[target](random.Random(f"{target} {seed}"), lab)
        try:
            use()
        except KcacheError as error:
            return type(error).__name__
        return "read"
    finally:
        lab.restore()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="of all files together")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case of each file")
    parser.add_argument("--target", choices=sorted(TARGETS), help="damage only this one")
    arguments = parser.parse_args()
    targets = [arguments.target] if arguments.target else list(TARGETS)
    leaks = 0
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(Path(scratch))
        for target in targets:
            outcomes: collections.Counter[str] = collections.Counter()
            seen: set[str] = set()
            for seed in range(arguments.first, arguments.first + arguments.cases // len(targets)):
                try:
                    outcomes[run_case(target, seed, lab)] += 1
                except Exception as error:  # noqa: BLE001  # finding out which is the purpose
                    outcomes["LEAKED " + type(error).__name__] += 1
                    frame = traceback.extract_tb(error.__traceback__)[-1]
                    if (where := f"{type(error).__name__} {frame.filename}:{frame.lineno}") not in seen:
                        seen.add(where)
                        traceback.print_exc(limit=-6)
                        print(f"case {seed} of {target}", flush=True)  # noqa: T201
            leaks += len(seen)
            print(f"{target:14} {sum(outcomes.values()):7,}  {dict(outcomes.most_common())}", flush=True)  # noqa: T201
    raise SystemExit(1 if leaks else 0)


if __name__ == "__main__":
    main()
