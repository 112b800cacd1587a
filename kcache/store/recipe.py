"""What decides the bytes of a table: its kind, its recipe, the recipe's fingerprint, and how two recipes differ."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from kcache.config import Stage
from kcache.config.shapes import Shape
from kcache.store.digests import EMPTY_CAPTION_KEY, ZERO_IMAGE_KEY, content_key

SCHEMA_VERSION = 1
"""That of recipes, for ever: it is part of their fingerprints, and `kcache.store.manifest` has that of caches."""

STORED_DTYPES = ("float16", "float32", "uint8")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}(-[a-z][a-z0-9_]{0,40})?(-[0-9]{1,6}(x[0-9]{1,6})?)?")
_MAX_SIZE = 1 << 24
"""Above any side of a row; with it, no product of sizes that a file claims is beyond reason."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def json_digest(value: Any) -> str:
    """sha256 (hex) of a value's `canonical_json`: equal values give equal digests."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class TableKind:
    """What all tables of one kind have in common, whatever their recipes."""

    name: str
    """The table's name, or what stands before the shape of its pictures: `latents` of latents-768."""
    per: Literal["image", "caption", "control"]
    """What has a row; "control" is an image that goes with another one, see `kcache.store.controls`."""
    reserved: bytes | None
    """Key of the row that stands for no input, which guidance drops to; None where every row is of some."""
    role: Literal["prior", "decoder"]
    """Whose repository holds the encoder."""
    component: str
    """The encoder's folder there."""
    with_it: tuple[str, ...]
    """Folders that it needs beside it."""
    fields: tuple[str, ...]
    """What a row consists of."""
    readers: tuple[Literal["prior", "decoder"], ...]
    """Who trains from it."""
    sided: bool = False
    """Whether there is a table for each shape that pictures are cropped to."""

    def dropped(self, captions: Any, images: Any) -> Any:
        """Of two masks, for captions and for images, the one that applies to rows of this kind; None for neither."""
        if self.reserved is None or self.per == "control":
            return None
        return captions if self.per == "caption" else images


IMAGE_EMBEDS = TableKind(
    name="image_embeds", per="image", reserved=ZERO_IMAGE_KEY, role="prior", component="image_encoder",
    with_it=("image_processor",),
    fields=("image_embeds",), readers=("prior", "decoder"),
)  # fmt: skip
TEXT = TableKind(
    name="text", per="caption", reserved=EMPTY_CAPTION_KEY, role="prior", component="text_encoder",
    with_it=("tokenizer",),
    fields=("text_embeds", "text_encoder_hidden_states"), readers=("prior",),
)  # fmt: skip
LATENTS = TableKind(
    name="latents", per="image", reserved=None, role="decoder", component="movq", with_it=(),
    fields=("latents",), readers=("decoder",), sided=True,
)  # fmt: skip
KINDS = (IMAGE_EMBEDS, TEXT, LATENTS)
"""What an encoder makes rows of."""
MASKS, LOSS_MASKS, HINT = "masks", "loss_masks", "hint-"
"""The names of kinds of control images: where a hole is, how much each part counts, and before its own name a hint."""
NO_MASK_KEY = content_key(b"kcache: no mask")
"""The key of the row of a sample without such a mask: nothing of it is hole, and all counts."""
SAMPLES, RESERVED = "samples", "reserved"
"""Names of the folders of tars, where tables have those of their kinds: whole samples, and the reserved rows."""

HINT_NAME = re.compile("[a-z][a-z0-9_]{0,19}")
_CONTROL = f"(?:{HINT}{HINT_NAME.pattern}|{MASKS}|{LOSS_MASKS})"
_OF_SHAPE = "-[1-9][0-9]{0,4}(?:x[1-9][0-9]{0,4})?"
TABLE_NAME = re.compile("|".join([*(kind.name + _OF_SHAPE * kind.sided for kind in KINDS), _CONTROL + _OF_SHAPE]))
SHARD_FOLDER = re.compile(rf"({TABLE_NAME.pattern}|{SAMPLES}|{RESERVED})-[0-9a-f]{{8}}")
"""Names of the folders that shards lie in: the table's, or the tars', and the first 8 digits of the fingerprint."""
_CONTROL_TABLE = re.compile(f"({_CONTROL}){_OF_SHAPE}")


def control_kind(name: str) -> TableKind:
    """The kind of tables of control images called `name`: "masks", "loss_masks", or "hint-" and the name of a hint."""
    return TableKind(
        name=name, per="control", reserved=None if name.startswith(HINT) else NO_MASK_KEY, role="decoder", component="",
        with_it=(), fields=(name.replace("-", "_"),), readers=("decoder",), sided=True,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def kind_of(table: str) -> TableKind:
    """The kind of the table called `table`, e.g. "latents-768"; raises ValueError for what is no table, as tars are."""
    if control := _CONTROL_TABLE.match(table):  # behind which an index array may have more
        return control_kind(control[1])
    for kind in KINDS:
        if kind.name == table.partition("-")[0]:
            return kind
    raise ValueError(f"{table!a} is no table; expected one of {', '.join(kind.name for kind in KINDS)}")


def is_control(name: str) -> bool:
    """Whether a kind of control images may be called so."""
    return re.fullmatch(_CONTROL, name) is not None


def controls_of(tables: Iterable[str]) -> tuple[str, ...]:
    """The names of the kinds of control images that there are tables of, sorted; tars and the like are passed over."""
    return tuple(sorted({control[1] for table in tables if (control := _CONTROL_TABLE.fullmatch(table))}))


def shape_of(table: str) -> Shape | None:
    """The shape of the pictures behind a table of which there is one for each; None for other tables."""
    if not kind_of(table).sided:
        return None
    height, _, width = table.rpartition("-")[2].partition("x")
    return int(height), int(width or height)


def table_name(kind: TableKind, shape: Shape) -> str:
    """The table of a kind that has pictures of `shape`: latents-640x896, or latents-768 for a square."""
    height, width = shape
    return f"{kind.name}-{height}" if height == width else f"{kind.name}-{height}x{width}"


def sides_of(tables: Collection[str]) -> list[int]:
    """The sides of the squares that there are tables for, ascending; names of no table are passed over."""
    shapes = (shape_of(name) for name in tables if TABLE_NAME.fullmatch(name))
    return sorted({shape[0] for shape in shapes if shape is not None and shape[0] == shape[1]})


def table_names(stage: Stage, shapes: Iterable[Shape]) -> tuple[str, ...]:
    """Names of the tables that a stage reads, e.g. ("image_embeds", "text", "latents-768") for "all" of one square."""
    shapes = list(dict.fromkeys(shapes))
    names: list[str] = []
    for kind in KINDS:
        if stage in ("all", *kind.readers):
            names += [table_name(kind, shape) for shape in shapes] if kind.sided else [kind.name]
    return tuple(names)


def stage_of(tables: Collection[str]) -> Stage:
    """The stage that reads all of `tables`."""
    kinds = [kind_of(table) for table in tables]
    if TEXT not in kinds:
        return "decoder"
    return "all" if LATENTS in kinds else "prior"


def components(role: str, stage: Stage) -> tuple[str, ...]:
    """Folders of the repository of `role`, "prior" or "decoder", that a build for a stage needs; () when none."""
    kinds = [kind for kind in KINDS if kind.role == role and stage in ("all", *kind.readers)]
    return tuple(name for kind in kinds for name in (kind.component, *kind.with_it))


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One array of a table: its name and the shape of one row."""

    name: str
    """Name of the array, as Kandinsky's pipelines call the tensor."""
    shape: tuple[int, ...]
    """Shape of one row; for a ragged field the shape of one of its tokens."""
    ragged: bool = False
    """Whether a row is a run of n tokens, n differing from row to row."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the bytes of one table; equal recipes under equal library versions give equal bytes."""

    table: str
    """Name of the table: "image_embeds", "text", or of a shape in pixels, as `table_name` gives it."""
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

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of the recipe's canonical JSON."""
        return json_digest(self.to_json())

    @property
    def of_tars(self) -> bool:
        """Whether it is of tars, which hold whole samples, and not of a table."""
        return self.table in (SAMPLES, RESERVED)

    @property
    def directory(self) -> str:
        """Name of the table's folder in a cache, as `SHARD_FOLDER` has it."""
        return f"{self.table}-{self.fingerprint[:8]}"


_UNSAID = {"preprocess.color": "as-is"}  # what older recipes mean by saying nothing


def recipe_differences(found: Recipe, wanted: Recipe) -> list[str]:
    """One line "field: found → wanted" for each field in which two recipes differ, nested fields by path."""
    return _differences(found.to_json(), wanted.to_json(), "")


def _differences(found: Any, wanted: Any, path: str) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for name in sorted(found.keys() | wanted.keys()):
            inner = f"{path}.{name}" if path else name
            unsaid = _UNSAID.get(inner)
            lines += _differences(found.get(name, unsaid), wanted.get(name, unsaid), inner)
        return lines
    return [] if found == wanted else [f"{path}: {_short(found)} → {_short(wanted)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text[:12] + "…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
