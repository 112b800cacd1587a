"""What travels between the process that plans and those that encode: small things, never rows.

A task says which inputs make a shard and where they are. Whether they are still what they were, their keys tell.
"""

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from kcache.build.plan import PlannedShard
from kcache.build.survey import Survey
from kcache.config import BuildConfig
from kcache.encoders.repositories import Repository
from kcache.errors import EngineError
from kcache.store.formats.columns import Samples
from kcache.store.recipe import Recipe, kind_of


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
    """By key: where in the source the picture stood, and its name there, which stays when others are added."""
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


def check_version(planned: str) -> None:
    """Raise EngineError where kcache is not of the version that a build was started with."""
    if (own := version("kcache")) != planned:
        raise EngineError(
            f"kcache is {own} on {socket.gethostname()}, and {planned} where the build was started; expected one "
            "version on all machines; install the same on each"
        )


def task_maker(job: Survey, recipe: Recipe) -> Callable[[PlannedShard], Task]:
    """A function from shards of a table of `job` to tasks."""
    if kind_of(recipe.table).per == "caption":
        samples = Samples.of(job.samples)
        return lambda shard: Task(recipe=recipe, shard=shard, captions=samples.texts(shard.keys))

    def of_pictures(shard: PlannedShard) -> Task:
        standing = zip(shard.keys, job.positions.find(shard.keys).tolist(), strict=True)
        pictures = {key: (number, job.source.name(number)) for key, number in standing if number >= 0}
        return Task(recipe=recipe, shard=shard, pictures=pictures)

    return of_pictures
