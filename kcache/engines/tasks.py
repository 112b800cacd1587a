"""What travels between the process that plans and those that encode: small things, never rows.

A task says which inputs make a shard and where they are. Whether they are still what they were, their keys tell. Where
it arrives it is first looked whether that machine can do it.
"""

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Protocol

import numpy as np

from kcache.build.plan import PlannedShard
from kcache.build.survey import Survey
from kcache.config import BuildConfig
from kcache.encoders.repositories import Repository
from kcache.errors import EngineError
from kcache.places import place_of
from kcache.store.digests import Keys, mirrored_keys
from kcache.store.formats.columns import Samples
from kcache.store.recipe import Recipe, kind_of
from kcache.store.shaped.wants import Wants


class Handed(Protocol):
    """What a crew hands out: a task about one shard of a plan."""

    @property
    def shard(self) -> PlannedShard:
        """What is to be committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What an actor has to know, whatever it will encode."""

    source: str
    """As the user gave it; relative names count from `directory`."""
    cache: str
    """A folder that every machine sees, or a URL."""
    plan: str
    """Where the plan that is worked off lies: who sees it sees the cache."""
    config: BuildConfig
    wants: Wants
    """Which rows the tables are to have of the samples."""
    repositories: Mapping[str, Repository]
    """Where the encoders were found, by role, and which revisions that were."""
    need_captions: bool
    directory: str
    threads: int
    """Of torch: sums are added up in an order that depends on it, so it is that of a build without an engine."""
    workers: int
    """Threads that decode."""
    version: str
    """Of kcache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A shard to be encoded and committed."""

    recipe: Recipe
    shard: PlannedShard
    pictures: Mapping[bytes, tuple[int, str]] = field(default_factory=dict)
    """By key: where in the source the picture stood, or the one that the control image goes with, and its name there,
    which stays when others are added."""
    captions: Mapping[bytes, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How an actor is doing."""

    host: str
    table: str
    """Whose encoder it holds; "" for none."""
    done: Mapping[str, int]
    """Inputs dealt with, of each shard that it has."""
    seconds: Mapping[str, float]
    """What the time of its encoding thread went into, of that table, as `TableResult.seconds` has it."""
    said: tuple[str, ...]
    """What was worth a line since the last look."""


def task_maker(job: Survey, recipe: Recipe) -> Callable[[PlannedShard], Task]:
    """A function from shards of a table of `job` to tasks."""
    if kind_of(recipe.table).per == "caption":
        samples = Samples.of(job.samples)
        return lambda shard: Task(recipe=recipe, shard=shard, captions=samples.texts(shard.keys))

    kind = kind_of(recipe.table)
    positions = job.controls[kind.name] if kind.per == "control" else job.positions

    def of_pictures(shard: PlannedShard) -> Task:
        # A mirror image is where its picture is.
        keys = Keys.of(shard.keys)
        numbers = np.maximum(positions.find(keys), positions.find(mirrored_keys(keys)))
        standing = zip(shard.keys, numbers.tolist(), strict=True)
        pictures = {key: (number, job.source.name(number)) for key, number in standing if number >= 0}
        return Task(recipe=recipe, shard=shard, pictures=pictures)

    return of_pictures


def check_version(wanted: str) -> None:
    """Raise EngineError where this machine has another kcache than the `wanted` one."""
    if (own := version("kcache")) != wanted:
        raise EngineError(
            f"kcache is {own} on {socket.gethostname()}, and {wanted} where this was started; "
            "expected one version on all machines; install the same on each"
        )


def check_seen(plan: str, directory: str) -> None:
    """Raise EngineError where this machine does not see the `plan` that is worked off; moves to `directory`."""
    with suppress(OSError):  # relative names mean what they mean where it was started
        os.chdir(directory)
    if not place_of(plan).is_dir():
        raise EngineError(
            f"{socket.gethostname()} does not see the plan that is worked off, {plan}; expected the cache on a file "
            "system that all machines of the cluster share under one path, or in a bucket; move it there, or give its "
            "URL"
        )
