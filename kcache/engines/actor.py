"""One that encodes, wherever it is: it opens the source itself, holds one encoder, and commits what it is given.

Ray keeps it in a process of its own, calls it from several threads, and is not known here. Tasks of one table are
encoded in one go, as a builder does it, so that the inputs of the next shard are decoded while this one is encoded.
"""

import gc
import logging
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from kcache.build.pictures.contents import as_named, control_as_named
from kcache.disk.memo import DigestMemo
from kcache.encoders.fit import enough_memory, workers_for
from kcache.encoders.recipes import in_srgb, table_recipe
from kcache.encoders.repositories import Repository, find_repository
from kcache.engines.tasks import Look, Setup, Task, check_seen, check_version
from kcache.errors import EngineError, ModelError
from kcache.machine import default_device, kept_to_groups
from kcache.places import place_of
from kcache.sources import Source, open_source
from kcache.store.controls.given import ControlImage
from kcache.store.recipe import LATENTS, Recipe, kind_of, recipe_differences

if TYPE_CHECKING:
    from kcache.build.work.meter import Meter
    from kcache.encoders.frozen import Encoder
    from kcache.store.shards import Commit


@dataclass
class _Given:
    """A task that somebody waits for."""

    task: Task
    result: "Future[None]" = field(default_factory=Future)
    done: int = 0


class Told(logging.Handler):
    """Keeps what the library warns of for who looks: nobody sees an actor's own stderr."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


class EncodingActor:
    """Encodes and commits shards of one plan, table after table."""

    def __init__(self, setup: Setup) -> None:
        """Nothing is loaded or opened before there is a task; raises nothing, so that there is always one to ask."""
        self._setup = setup
        self._waiting: deque[_Given] = deque()
        self._under_way: dict[str, _Given] = {}
        self._changed = threading.Condition()
        self._said: list[str] = []
        self._stopped = False
        self._source: Source | None = None
        self._by_name: dict[str, int] | None = None
        self._encoder: Encoder | None = None
        self._meter: Meter | None = None
        self._checked = False
        logging.getLogger("kcache").addHandler(Told(self._said))
        threading.Thread(target=self._work, name="kcache-actor", daemon=True).start()

    def build(self, task: Task) -> Look:
        """Encode and commit a shard, and say how it is doing then; raises what a builder raises.

        May be called again while it runs, from another thread: that shard comes next.
        """
        given = _Given(task)
        with self._changed:
            self._check_stopped()
            self._waiting.append(given)
            self._changed.notify()
        given.result.result()
        return self.look()

    def look(self) -> Look:
        """How it is doing; may be called while it builds."""
        check_version(self._setup.version)
        with self._changed:
            done = {name: given.done for name, given in self._under_way.items()}
            said = tuple(self._said)
            del self._said[: len(said)]
        meter = self._meter
        seconds = {**meter.seconds, "held_up": meter.held_up} if meter else {}
        table = "" if self._encoder is None else self._encoder.recipe.table
        return Look(host=socket.gethostname(), table=table, done=done, seconds=seconds, said=said)

    def stop(self) -> None:
        """Give up after the batch: shards that are not committed by then leave nothing."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if not self._waiting:
                    return
                first = self._waiting.popleft()
            try:
                self._encode(first)
            except BaseException as error:  # noqa: BLE001  # raised again where the task was given
                with self._changed:
                    failed = {id(given): given for given in (first, *self._under_way.values())}
                    self._under_way.clear()
                for given in failed.values():
                    if not given.result.done():
                        given.result.set_exception(error)

    def _encode(self, first: _Given) -> None:
        """Encode the `first` task, and those of its table that come while it does."""
        from kcache.build.encode import encode_shards

        setup, recipe = self._setup, first.task.recipe
        self._check_stopped()
        if not self._checked:
            check_seen(setup.plan, setup.directory)
            self._checked = True
        with enough_memory(recipe):
            encoder, meter = self._loaded(recipe)
            if first.task.pictures and self._source is None:
                config = setup.config
                self._source = open_source(
                    setup.source, config,
                    max_train_samples=config.max_train_samples, need_captions=setup.need_captions,
                )  # fmt: skip
            with kept_to_groups(encoder.device.type):
                encode_shards(
                    encoder, place_of(setup.cache) / recipe.directory,
                    (given.task.shard for given in self._given(first)), lambda _: self._fetch,
                    workers=workers_for(recipe, setup.workers, 2 * len(first.task.shard.keys)),
                    meter=meter, done=self._count, committed=self._committed,
                    takes=partial(setup.wants.takes, recipe.table),
                )  # fmt: skip

    def _given(self, first: _Given) -> Iterator[_Given]:
        """The tasks that can be encoded now, each one taken when its inputs are to be decoded."""
        given: _Given | None = first
        while given is not None:
            with self._changed:
                self._under_way[given.task.shard.name] = given
            yield given
            with self._changed:
                more = self._waiting and self._waiting[0].task.recipe == first.task.recipe
                given = self._waiting.popleft() if more else None

    def _count(self, inputs: int) -> None:
        """`inputs` more were dealt with: of the first shard that has any left, as shards are encoded in turn."""
        self._check_stopped()
        with self._changed:
            for given in self._under_way.values():
                taken = min(inputs, len(given.task.shard.keys) - given.done)
                given.done += taken
                inputs -= taken

    def _check_stopped(self) -> None:
        if self._stopped:
            raise EngineError(f"the actor on {socket.gethostname()} was told to stop")

    def _committed(self, commit: "Commit") -> None:
        with self._changed:
            given = self._under_way.pop(commit.name)
        given.result.set_result(None)

    def _fetch(self, key: bytes) -> bytes | str | ControlImage | None:
        """The content behind a key, None where the source no longer gives that content."""
        for given in list(self._under_way.values()):
            if key in given.task.captions:
                return given.task.captions[key]
            if key in given.task.pictures:
                number = self._number(*given.task.pictures[key])
                if self._source is None or number is None:
                    return None
                kind = kind_of(given.task.recipe.table)
                if kind.per == "control":
                    return control_as_named(self._source, number, kind.name, key)
                return as_named(self._source.image(number), key)
        return None

    def _number(self, number: int, name: str) -> int | None:
        """Where in the source the picture called `name` stands, first looked for where it stood."""
        source = self._source
        if source is None or (number < len(source) and source.name(number) == name):
            return number
        with self._changed:
            if self._by_name is None:
                self._by_name = {source.name(i): i for i in range(len(source))}
            return self._by_name.get(name)

    def _loaded(self, recipe: Recipe) -> "tuple[Encoder, Meter]":
        """The encoder of `recipe`, loaded where another one was held, and where its time goes."""
        import torch

        from kcache.build.work.meter import Meter
        from kcache.encoders.frozen import load_encoder, shares_network

        if self._encoder is None or self._meter is None or self._encoder.recipe != recipe:
            if not shares_network(self._encoder, recipe):
                self._encoder = None
                gc.collect()  # the one before it, so that there is room for this
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            torch.set_num_threads(self._setup.threads)
            device = torch.device(self._setup.config.device or default_device())
            repository = self._repository(recipe)
            self._encoder, self._meter = (
                load_encoder(recipe, repository, device, self._setup.config.max_pixels, held=self._encoder),
                Meter(),
            )
        return self._encoder, self._meter

    def _repository(self, recipe: Recipe) -> Repository:
        """Where the encoder of `recipe` is on this machine; raises ModelError where it is not the planned one."""
        config, kind = self._setup.config, kind_of(recipe.table)
        planned = self._setup.repositories[kind.role]
        name = planned.name if planned.revision else str(planned.path)
        # What packs control images is no network; how many pixels a latent has, the latents' own says.
        component = LATENTS.component if kind.per == "control" else kind.component
        found = find_repository(name, planned.revision, (component, *kind.with_it))
        with DigestMemo() as memo:
            own = table_recipe(recipe.table, config, found, memo, say=self._said.append, known=recipe)
        own = in_srgb(own) if recipe.preprocess.get("color") == "srgb" else own  # as the build has decided
        if own.fingerprint != recipe.fingerprint:
            differences = "; ".join(recipe_differences(recipe, own))
            raise ModelError(
                f"{found.path} on {socket.gethostname()} is not what the build was planned with ({differences}); "
                "expected the same files on all machines; copy them, or name a repository of the Hub with a revision"
            )
        return found
