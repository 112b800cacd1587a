"""What a build will write, decided before it writes: wanted keys, minus what is there, cut into numbered shards.

The functions here are pure but for `open_plan`, `freeze_plan` and `close_plan`, which read, create and remove the one
open plan of a cache. A plan is created once and never cut again, so a build that was killed goes on where it stopped
and ends with the same bytes.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kcache.disk.durable import (
    publish,
    read_npy,
    sync_folder,
    temporary_folder,
    temporary_path,
    write_json,
    write_npy,
    writing,
)
from kcache.errors import CacheBusyError, CacheWriteError
from kcache.foreign import corrupt
from kcache.store.digests import KEY_BYTES, pack_keys, unpack_keys
from kcache.store.manifest import check_count
from kcache.store.recipe import SCHEMA_VERSION, Recipe, canonical_json

CLAIMS = "claims"
"""Name of the folder beside an open plan where builders claim its shards."""


def shard_name(number: int) -> str:
    """Name of shard `number`: five digits, more when there are more shards."""
    return f"{number:05d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    """One shard to be: its name and the keys of its inputs, in order."""

    name: str
    keys: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePlan:
    """The shards to be of one table."""

    recipe: Recipe
    rows_per_shard: int
    first_shard: int
    """Number of the first new shard: one more than the highest committed."""
    keys: tuple[bytes, ...]
    """Inputs to encode, in sample order."""
    shards: tuple[PlannedShard, ...] = field(init=False, repr=False, compare=False)
    """The keys cut into runs of `rows_per_shard`, the last one shorter."""

    def __post_init__(self) -> None:
        starts = enumerate(range(0, len(self.keys), self.rows_per_shard), self.first_shard)
        runs = ((shard_name(number), self.keys[start : start + self.rows_per_shard]) for number, start in starts)
        object.__setattr__(self, "shards", tuple(PlannedShard(name=name, keys=keys) for name, keys in runs))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The open plan of a cache: what every builder of it works off."""

    tables: tuple[TablePlan, ...]

    @property
    def keys(self) -> tuple[bytes, ...]:
        """All inputs, table after table."""
        return tuple(key for table in self.tables for key in table.keys)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the recipes, cuts and keys."""
        digest = hashlib.sha256()
        for table in self.tables:
            digest.update(canonical_json(_table_json(table)).encode())
            digest.update(b"".join(table.keys))
        return digest.hexdigest()


def plan_table(
    recipe: Recipe,
    wanted: Sequence[bytes],
    stored: Collection[bytes],
    rejected: Collection[bytes],
    *,
    rows_per_shard: int,
    first_shard: int,
) -> TablePlan:
    """The plan that encodes each wanted key that is neither stored nor rejected, once, in order of first use."""
    missing = tuple(key for key in dict.fromkeys(wanted) if key not in stored and key not in rejected)
    return TablePlan(recipe=recipe, rows_per_shard=rows_per_shard, first_shard=first_shard, keys=missing)


def freeze_plan(cache: Path, plan: Plan) -> None:
    """Make `plan` the cache's open plan, in one step; raises CacheBusyError when there is one already."""
    size = len(plan.keys) * KEY_BYTES
    with writing(cache / "plans", size), temporary_folder(cache) as temporary:
        folder = temporary / plan.digest[:16]
        (folder / CLAIMS).mkdir(parents=True)
        for table in plan.tables:
            write_npy(folder / f"{table.recipe.table}.keys.npy", pack_keys(table.keys))
        tables = [_table_json(table) for table in plan.tables]
        write_json(folder / "plan.json", {"schema_version": SCHEMA_VERSION, "digest": plan.digest, "tables": tables})
        sync_folder(temporary)
        try:
            publish(temporary, cache / "plans")
        except CacheWriteError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise CacheBusyError(f"{cache / 'plans'} holds a plan already; build again to finish it") from error
            raise


def open_plan(cache: Path) -> Plan | None:
    """The cache's open plan, or None; raises CacheCorruptError when what stands there is not a whole plan."""
    plans = cache / "plans"
    if not plans.is_dir() or not (folders := sorted(plans.iterdir())):
        return None
    try:
        data = json.loads((folders[0] / "plan.json").read_bytes())
        plan = Plan(tables=tuple(_read_table(folders[0], table) for table in data["tables"]))
        if plan.digest != data["digest"]:
            raise ValueError("its digest does not match its content")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise corrupt(error, plans, "remove this open plan and build again") from error
    return plan


def claims_folder(cache: Path, plan: Plan) -> Path:
    """Where builders claim the shards of an open plan; it goes with the plan."""
    return cache / "plans" / plan.digest[:16] / CLAIMS


def close_plan(cache: Path) -> None:
    """Remove the open plan: its work is done, or it is of recipes that nobody wants any more."""
    if (cache / "plans").is_dir():
        done = temporary_path(cache)
        with writing(cache / "plans"):
            (cache / "plans").rename(done)
            sync_folder(cache)
            shutil.rmtree(done)


def _table_json(table: TablePlan) -> Mapping[str, object]:
    return {
        "recipe": table.recipe.to_json(),
        "rows_per_shard": table.rows_per_shard,
        "first_shard": table.first_shard,
        "rows": len(table.keys),
    }


def _read_table(folder: Path, data: Mapping[str, object]) -> TablePlan:
    recipe = Recipe.from_json(data["recipe"])  # type: ignore[arg-type]  # a wrong type raises TypeError, which the caller expects
    keys = unpack_keys(read_npy(folder / f"{recipe.table}.keys.npy"))
    if len(keys) != data["rows"]:
        raise ValueError(f"{recipe.table}.keys.npy holds {len(keys)} keys; expected {data['rows']}")
    check_count(data["first_shard"], data["rows_per_shard"])
    if not data["rows_per_shard"]:
        raise ValueError("its shards have no rows")
    return TablePlan(
        recipe=recipe,
        rows_per_shard=int(data["rows_per_shard"]),  # type: ignore[call-overload]
        first_shard=int(data["first_shard"]),  # type: ignore[call-overload]
        keys=tuple(keys),
    )
