"""What a build will write, decided before it writes: wanted keys, minus what is there, cut into numbered shards.

The functions here are pure but for those that look what of a plan is committed, and `open_plan`, `freeze_plan` and
`close_plan`, which read, create and remove the one open plan of a cache. A plan is created once and never cut again, so
a build that was killed goes on where it stopped and ends with the same bytes. It lies in `plans/<digest>/`, and is open
when `plans/open.json`, created once, names it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from kcache.config.shapes import ShapeSet
from kcache.disk.durable import json_bytes, npy_of, read_npy, writing
from kcache.errors import CacheBusyError, CacheMismatchError
from kcache.foreign import corrupt
from kcache.places import Place
from kcache.places.effects import (
    create_bytes,
    make_folder,
    publish,
    remove,
    swap_bytes,
    temporary_folder,
    write_json,
    write_npy,
)
from kcache.places.holds import knows_readers
from kcache.store.digests import Keys
from kcache.store.manifest import (
    CONTROLS_VERSION,
    SCHEMA_VERSIONS,
    SHAPES_VERSION,
    check_count,
    check_version,
    shape_set,
)
from kcache.store.recipe import Recipe, canonical_json, controls_of
from kcache.store.shaped.wants import Wants, squares_of

CLAIMS = "claims"
"""Name of the folder beside an open plan where builders claim its shards."""
OPEN = "open.json"
"""Name of the file that names the open plan."""
_SCHEMA_VERSION = 2
"""A plan of version 1 is open by being there; one of version 3 says shapes or mirrored pictures."""
_CLOSED = json_bytes({"digest": None})
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DAMAGES = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def shard_name(number: int) -> str:
    """Name of shard `number`: five digits, more when there are more shards."""
    return f"{number:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """One shard to be: its name and the keys of its inputs, in order."""

    name: str
    keys: Sequence[bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePlan:
    """The shards to be of one table."""

    recipe: Recipe
    rows_per_shard: int
    first_shard: int
    """Number of the first new shard: one more than the highest committed."""
    keys: Keys
    """Inputs to encode, in sample order."""
    shards: tuple[PlannedShard, ...] = field(init=False, repr=False, compare=False)
    """The keys cut into runs of `rows_per_shard`, the last one shorter."""

    def __post_init__(self) -> None:
        starts = enumerate(range(0, len(self.keys), self.rows_per_shard), self.first_shard)
        runs = ((shard_name(number), self.keys[start : start + self.rows_per_shard]) for number, start in starts)
        object.__setattr__(self, "shards", tuple(PlannedShard(name=name, keys=keys) for name, keys in runs))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The open plan of a cache: what every builder of it works off."""

    tables: tuple[TablePlan, ...]
    shapes: tuple[ShapeSet, ...] = ()
    """What pictures are cropped to, as `Manifest.shapes` has it: () for plain squares."""
    flip: bool = False
    """Whether there are to be rows of the mirrored pictures."""

    @property
    def wants(self) -> Wants:
        """Which rows its tables are to have of the samples."""
        names = [table.recipe.table for table in self.tables]
        return Wants(self.shapes or squares_of(names), self.flip, controls_of(names))

    @property
    def keys(self) -> Keys:
        """All inputs, table after table."""
        return Keys.joined(table.keys.packed for table in self.tables)

    @property
    def rows(self) -> int:
        """How many inputs there are."""
        return sum(len(table.keys) for table in self.tables)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the recipes, cuts and keys, and of what it says of shapes."""
        digest = hashlib.sha256(canonical_json(self.shapes_json).encode() if self.shapes_json else b"")
        for table in self.tables:
            digest.update(canonical_json(_table_json(table)).encode())
            digest.update(table.keys.packed.data)
        return digest.hexdigest()

    @property
    def shapes_json(self) -> dict[str, object]:
        """What its file says of shapes and mirrored pictures: nothing where it is of plain squares."""
        return {"shapes": list(map(asdict, self.shapes)), "flip": self.flip} if self.shapes or self.flip else {}


def plan_table(
    recipe: Recipe,
    wanted: Iterable[bytes],
    stored: Iterable[bytes],
    rejected: Iterable[bytes],
    *,
    rows_per_shard: int,
    first_shard: int,
) -> TablePlan:
    """The plan that encodes each wanted key that is neither stored nor rejected, once, in order of first use."""
    missing = Keys.of(wanted)
    for known in (stored, rejected):
        missing = missing.where(~missing.among(known))
    return TablePlan(recipe=recipe, rows_per_shard=rows_per_shard, first_shard=first_shard, keys=missing.unique())


def freeze_plan(cache: Place, plan: Plan) -> None:
    """Make `plan` the cache's open plan, in one step; raises CacheBusyError when another one is that already."""
    plans = cache / "plans"
    folder = plans / plan.digest[:16]
    make_folder(plans)
    if not _is_whole(folder, plan.digest):
        remove(folder)
        with temporary_folder(cache) as temporary:
            with writing(temporary):
                (temporary / CLAIMS).mkdir()
            for table in plan.tables:
                write_npy(temporary / f"{table.recipe.table}.keys.npy", table.keys.packed)
            tables = [_table_json(table) for table in plan.tables]
            version = SHAPES_VERSION if plan.shapes_json else _SCHEMA_VERSION
            version = CONTROLS_VERSION if plan.wants.controls else version
            data = {"schema_version": version, "digest": plan.digest, "tables": tables, **plan.shapes_json}
            write_json(temporary / "plan.json", data)
            publish(temporary, folder)
    if create_bytes(plans / OPEN, _naming(plan)) or (found := _read(plans / OPEN)) == _naming(plan):
        return
    if found is None or open_plan(cache) is not None:
        raise CacheBusyError(f"{plans} holds a plan already; build again to finish it")
    swap_bytes(plans / OPEN, _naming(plan), found)


def _is_whole(folder: Place, digest: str) -> bool:
    """Whether the plan with this digest is all there: a build may have been killed before it was open."""
    try:
        return _read_plan(folder).digest == digest
    except _DAMAGES:
        return False


def _read(path: Place) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def open_plan(cache: Place) -> Plan | None:
    """The cache's open plan, or None; raises CacheCorruptError when what stands there is not a whole plan."""
    plans, digest = cache / "plans", None
    try:
        if (digest := _open_digest(plans)) is not None:
            folder = plans / digest[:16]
        elif _read(plans / OPEN) is None and (earlier := _of_schema_1(plans)) is not None:
            folder = earlier
        else:
            return None
        plan = _read_plan(folder)
        if digest not in (None, plan.digest):
            raise ValueError("its digest is not the one that is open")
    except CacheMismatchError:
        raise
    except _DAMAGES as error:
        if digest is not None and _open_digest(plans) != digest:
            return open_plan(cache)  # it was closed meanwhile
        if digest is not None and isinstance(error, FileNotFoundError):
            return None  # another builder was about to clear what was left of it: a new plan takes its place
        raise corrupt(error, plans, "remove this open plan and build again") from error
    return plan


def _open_digest(plans: Place) -> str | None:
    """The digest of the plan that is open; None where none is named. Raises ValueError and others of `_DAMAGES`."""
    content = _read(plans / OPEN)
    if content in (None, _CLOSED):
        return None
    digest = json.loads(content)["digest"]
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{OPEN} names {digest!a}, which is no digest")
    return str(digest)


def _of_schema_1(plans: Place) -> Place | None:
    """The folder of a plan that is open by being there, or damaged; those of schema 2 must be named to be open."""
    folders = sorted(path for path in plans.iterdir() if path.name[:1] != ".") if plans.is_dir() else []
    for folder in folders:
        try:
            if json.loads((folder / "plan.json").read_bytes())["schema_version"] != 1:
                continue
        except FileNotFoundError:
            continue
        except _DAMAGES:
            pass
        return folder
    return None


def is_open(cache: Place, plan: Plan) -> bool:
    """Whether `plan` is the open one still: another builder closes it once all of it is committed."""
    named = _read(cache / "plans" / OPEN)
    return named == _naming(plan) or (
        named is None and _of_schema_1(cache / "plans") == claims_folder(cache, plan).parent
    )


def unfinished(cache: Place, plan: Plan) -> list[tuple[TablePlan, list[PlannedShard]]]:
    """The shards of each table of `plan` that are not committed, tables without any left out."""
    left = [(table, uncommitted(cache, table, table.shards)) for table in plan.tables if table.keys]
    return [(table, shards) for table, shards in left if shards]


def uncommitted(cache: Place, table: TablePlan, shards: Sequence[PlannedShard]) -> list[PlannedShard]:
    """Those of `shards` that have no commit record: found out by one listing, as each look may be a request."""
    committed = {path.stem for path in (cache / table.recipe.directory).glob("*.json")}
    return [shard for shard in shards if shard.name not in committed]


def claims_folder(cache: Place, plan: Plan) -> Place:
    """Where builders claim the shards of an open plan; it goes with the plan."""
    return cache / "plans" / plan.digest[:16] / CLAIMS


def close_plan(cache: Place, plan: Plan) -> None:
    """End `plan`, which was open: its work is done, or it is of recipes that nobody wants any more.

    Its files go, but in a bucket, where another builder may open it again at this moment, and no file can be removed
    only as long as it is what was read.
    """
    plans = cache / "plans"
    if not knows_readers(cache) and _read(plans / OPEN) is not None:
        with suppress(CacheBusyError):  # another builder did so, and has perhaps opened the next one
            swap_bytes(plans / OPEN, _CLOSED, _naming(plan))
        return
    if _read(plans / OPEN) == _naming(plan):
        remove(plans / OPEN)
    remove(plans / plan.digest[:16])
    if plans.is_dir() and not any(plans.iterdir()):
        remove(plans)


def clear_plans(cache: Place) -> None:
    """Remove what builders left of plans who were killed before one was open, or after; for when none is open."""
    plans = cache / "plans"
    if plans.is_dir() and _read(plans / OPEN) in (None, _CLOSED):
        remove(plans)


def _naming(plan: Plan) -> bytes:
    return json_bytes({"digest": plan.digest})


def _table_json(table: TablePlan) -> Mapping[str, object]:
    return {
        "recipe": table.recipe.to_json(),
        "rows_per_shard": table.rows_per_shard,
        "first_shard": table.first_shard,
        "rows": len(table.keys),
    }


def _read_plan(folder: Place) -> Plan:
    """The plan in `folder`; raises what `_DAMAGES` lists."""
    data = json.loads((folder / "plan.json").read_bytes())
    check_version(folder / "plan.json", data["schema_version"], SCHEMA_VERSIONS)
    plan = Plan(
        tables=tuple(_read_table(folder, table) for table in data["tables"]),
        shapes=tuple(map(shape_set, data.get("shapes", ()))),
        flip=bool(data.get("flip", False)),
    )
    if plan.digest != data["digest"]:
        raise ValueError("its digest does not match its content")
    return plan


def _read_table(folder: Place, data: Mapping[str, object]) -> TablePlan:
    recipe = Recipe.from_json(data["recipe"])  # type: ignore[arg-type]  # a wrong type raises TypeError, which the caller expects
    path = folder / f"{recipe.table}.keys.npy"
    packed = read_npy(path, mapped=True) if isinstance(path, Path) else npy_of(path.read_bytes(), path.name)
    keys = Keys.checked(np.asarray(packed))
    if len(keys) != data["rows"]:
        raise ValueError(f"{recipe.table}.keys.npy holds {len(keys)} keys; expected {data['rows']}")
    check_count(data["first_shard"], data["rows_per_shard"])
    if not data["rows_per_shard"]:
        raise ValueError("its shards have no rows")
    return TablePlan(
        recipe=recipe,
        rows_per_shard=int(data["rows_per_shard"]),  # type: ignore[call-overload]
        first_shard=int(data["first_shard"]),  # type: ignore[call-overload]
        keys=keys,
    )
