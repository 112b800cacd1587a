"""What a forger would put into files: pickles that leave a marker, and JSON that says it is whole and is not.

Every payload would make the file `marker` if it ever ran.
"""

import gzip
import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings

from kcache import Cache
from kcache.build.plan import open_plan
from kcache.store.recipe import canonical_json
from kcache.store.shards import read_commits

MANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def pickles(marker: Path) -> dict[str, bytes]:
    """Each form in which a pickle may stand in a file."""
    content = pickle.dumps(Payload(marker))
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Payload(marker)], object))
    torch.save({"state": Payload(marker)}, archive)
    return {
        "pkl": content, "pickle": content, "pyd": content, "pth": archive.getvalue(), "pkl.gz": gzip.compress(content),
        "npy": array.getvalue(), "bin": archive.getvalue(), "txt": content, "json": content, "jpg": content,
    }  # fmt: skip


DEEP = b"[" * 200_000
NOT_JSON = [b"", b"null", b"[]", b"7", b'"x"', b"{}", DEEP, b'{"a":' * 50_000, b"9" * 10_000, b"NaN", b"\xff\xfe", b"{"]


def resealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file of JSON with a digest of its own content, as one who knows how it is made would."""
    data = json.loads(path.read_bytes())
    data.pop("digest", None)
    change(data)
    digest = hashlib.sha256(canonical_json(data).encode()).hexdigest()
    path.write_text(json.dumps({**data, "digest": digest}))


def set_in(*keys: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """A change that puts a value at a place in nested JSON; a star stands for whatever comes first."""

    def with_value(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(data: dict[str, Any]) -> None:
            place: Any = data
            for key in keys[:-1]:
                place = place[next(iter(place)) if key == "*" else key]
            place[keys[-1]] = value

        return change

    return with_value


OUT = "../../outside/precious"
VALUES = [
    OUT, "/etc/passwd", "..", "", "latents-64-00000000/../../x", "latents-64-00000000/00000/../x", "a\0b", "٣٣٣٣٣",
    None, True, -1, 10**30, 1.5, [], {}, [[]], {"a": {}}, "object", "O", "V9", [10**9, 10**9], [0], [-1],
]  # fmt: skip


def use_all(cache: Path) -> None:
    """Open and read everything that a cache holds."""
    opened = Cache.open(cache)
    fields = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]
    opened.read(range(len(opened)), fields)
    opened.samples  # noqa: B018
    for recipe in opened.recipes.values():
        read_commits(cache / recipe.directory, recipe)
    open_plan(cache)
