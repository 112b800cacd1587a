"""Why rows are missing, in words: new, edited, lost, rejected before, or asked for in another way than before."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from kcache.build.plan import open_plan
from kcache.config.shapes import NO_SHAPE
from kcache.store.digests import Keys, mirrored_keys
from kcache.store.formats.columns import Samples
from kcache.store.recipe import kind_of, recipe_differences
from kcache.store.shaped.wants import Wants
from kcache.tally import counted

if TYPE_CHECKING:
    from kcache.build.plan import Plan, TablePlan
    from kcache.build.survey import Survey
    from kcache.store.index import TableState


def why_missing(job: "Survey", states: Mapping[str, "TableState"], plan: "Plan") -> dict[str, str]:
    """For each table of `plan`, in words, why the rows that it lacks are missing; "" where none is."""
    left = open_plan(job.folder)  # by a build that was interrupted, or has not ended
    begun = {table.recipe.table for table in left.tables} if left else set[str]()
    return {
        name: _why(job, states[name], table, name in begun) if table.keys else ""
        for name, table in ((table.recipe.table, table) for table in plan.tables)
    }


def _why(job: "Survey", state: "TableState", table: "TablePlan", is_begun: bool) -> str:
    name, found = table.recipe.table, job.earlier.get(table.recipe.table, table.recipe)
    if found != table.recipe:
        return f"the table in the cache is of another recipe ({'; '.join(recipe_differences(found, table.recipe))})"
    kind = kind_of(name)
    keys = table.keys[~table.keys.among(() if kind.reserved is None else (kind.reserved,))]
    mirrored = keys.among(mirrored_keys(Samples.of(job.samples).image_keys))
    # Shapes that the cache had before another list took their place have rows that stayed, and nobody left undone.
    if name not in job.earlier and (is_begun or not job.before or not kind.sided or not len(state.stored.keys)):
        left = "what an interrupted build left to do" if len(state.stored.keys) else "the table is new"
        return f"{left}: {_inputs(kind.per, mirrored)}"
    rejected, had = keys.among(state.rejected), job.manifest.wants if job.manifest else Wants(())
    lost = keys.among(had.keys(name, job.before)) & ~rejected
    # What is left of pictures that the cache has was not to be in this table before.
    known = (keys.among(job.before.image_keys) | keys.among(mirrored_keys(job.before.image_keys))) & ~lost & ~rejected
    first = known & mirrored & (not had.flip)
    small = _of_too_small(job, had, keys) & ~(known | lost | rejected)
    reasons = {
        "new or edited since the last build": ~(known | lost | rejected | small),
        "too small for --max-upscale before": small,
        "not asked for before": first,
        "of this shape now": known & ~first,
        "whose rows are lost": lost,
        "rejected before, to be tried again": rejected,
    }
    parts = [f"{_inputs(kind.per, mirrored[which])} {what}" for what, which in reasons.items() if which.any()]
    return ", ".join(parts) or "the reserved row is lost"


def _of_too_small(job: "Survey", had: Wants, keys: Keys) -> np.ndarray:
    """(n,) bool: which of `keys` are of pictures that what the cache `had` has no row of at any resolution."""
    samples = Samples.of(job.samples)
    if not had.sets or any(each.is_square for each in had.sets):
        return np.zeros(len(keys), np.bool_)
    small = samples.where(np.logical_and.reduce([samples.in_shapes(each) == NO_SHAPE for each in had.sets]))
    return keys.among(small.image_keys) | keys.among(mirrored_keys(small.image_keys))


def _inputs(noun: str, mirrored: np.ndarray) -> str:
    """How many inputs there are, `mirrored` (n,) of bool those that are mirror images."""
    flipped = int(mirrored.sum())
    own = len(mirrored) - flipped
    if own == flipped and own:
        return f"{counted(own, noun)} and {'its mirror image' if own == 1 else 'their mirror images'}"
    counts = {noun: own, f"mirror {noun}": flipped}
    return " and ".join(counted(count, what) for what, count in counts.items() if count) or counted(0, noun)
