"""What decides the bytes of a table: the recipe, its fingerprint, and how two recipes differ."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA_VERSION = 1
"""Raised by one whenever the bytes on disk of an unchanged recipe would change."""

STORED_DTYPES = ("float16", "float32")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}(-[0-9]{1,6})?")
_MAX_SIZE = 1 << 24
"""Above any side of a row; with it, no product of sizes that a file claims is beyond reason."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One array of a table: its name and the shape of one row."""

    name: str
    """Name of the array, as Kandinsky's pipelines call the tensor."""
    shape: tuple[int, ...]
    """Shape of one row; for a ragged field the shape of one of its tokens."""
    ragged: bool = False
    """Whether a row is a run of n tokens, n differing from row to row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides the bytes of one table; equal recipes under equal library versions give equal bytes."""

    table: str
    """Name of the table: "image_embeds", "text", or "latents-R" for resolution R in pixels."""
    encoder: str
    """Class of the frozen network, e.g. "CLIPVisionModelWithProjection"."""
    weights: str
    """sha256 (hex) of the contents of the network's safetensors files."""
    config: str
    """sha256 (hex) of what its config.json says about the architecture."""
    preprocess: Mapping[str, Any]
    """Everything between the content and the network's input: backend, geometry, alpha, tokenizer digest."""
    compute_dtype: str
    """"float32", "float16" or "bfloat16": the dtype that the network ran in."""
    batch_shape: tuple[int, ...]
    """Shape of the batch that the network always sees, e.g. (16, 3, 224, 224)."""
    stored_dtype: str
    """"float16" or "float32": the dtype of the rows on disk."""
    fields: tuple[Field, ...]
    """The arrays that one row consists of."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values, as it stands in the manifest."""
        return json.loads(canonical_json(asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_json` wrote; raises KeyError, TypeError or ValueError on foreign data."""
        values = dict(data)
        values["batch_shape"] = tuple(values["batch_shape"])
        values["fields"] = tuple(
            Field(name=f["name"], shape=tuple(f["shape"]), ragged=f["ragged"]) for f in values["fields"]
        )
        recipe = cls(**values)
        # These two become parts of paths.
        for name in (recipe.table, *(field.name for field in recipe.fields)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!a} is no name of a table or field")
        if not all(type(size) is int and 0 < size < _MAX_SIZE for field in recipe.fields for size in field.shape):
            raise ValueError(f"field shapes {[field.shape for field in recipe.fields]!a}")
        return recipe

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of the recipe's canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()

    @property
    def directory(self) -> str:
        """Name of the table's folder in a cache: the table and the first 8 digits of the fingerprint."""
        return f"{self.table}-{self.fingerprint[:8]}"


def recipe_differences(found: Recipe, wanted: Recipe) -> list[str]:
    """One line "field: found → wanted" for each field in which two recipes differ, nested fields by path."""
    return _differences(found.to_json(), wanted.to_json(), "")


def _differences(found: Any, wanted: Any, path: str) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for name in sorted(found.keys() | wanted.keys()):
            inner = f"{path}.{name}" if path else name
            lines += _differences(found.get(name), wanted.get(name), inner)
        return lines
    return [] if found == wanted else [f"{path}: {_short(found)} → {_short(wanted)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text[:12] + "…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
