"""The stage: rows in memory between the files that they come from and the batches that take them, each for one use.

A private arena of slots per field; nothing is shared with other processes, and nothing stays behind. Rows are asked for
in order of first use, a range of neighbours at a time, as soon as there are slots for them; a batch takes its rows and
gives their slots back. There is no eviction, so nothing is read twice, and whoever waits waits for what comes next.
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from kcache.errors import KcacheError
from kcache.loader.streaming.fetches import ENOUGH_ROWS, Fetch, Layout, Tally, plan_fetches
from kcache.loader.streaming.ranges import Ranges
from kcache.loader.streaming.ration import AT_ONCE, Ration
from kcache.loader.streaming.slots import Arena, Run
from kcache.stopping import LAST_WORD_SECONDS
from kcache.store.cache import Cache
from kcache.store.controls.packed import unpacked_rows
from kcache.store.formats.checksums import crc32c
from kcache.store.rows import Empty, token_numbers
from kcache.store.shards import OFFSETS

logger = logging.getLogger(__name__)

_TRIES = 4
"""How often a range is asked for whose rows are not what was committed: a store or a line may err, the disk too."""
_UNPACKERS = 2
"""Threads that verify what came and copy it into slots."""

Wishes = tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]
"""Samples (n,) of one window, or a part of it, in the order of their use, their captions, and which go without what."""


class Arrival(NamedTuple):
    """When the rows of a batch had come, and when all were verified and in their slots: times of `perf_counter`."""

    came: float
    ready: float

    def parts(self, start: float, end: float) -> dict[str, float]:
        """What somebody who waited for the batch from `start` to `end` waited for: seconds."""
        came, ready = (min(max(moment, start), end) for moment in self)
        return {"store": came - start, "verification": max(ready - came, 0.0), "copying": end - max(came, ready)}


class Stage:
    """Rows on their way to batches; `take` gives them in the order of the wishes. For one pass over these."""

    def __init__(
        self,
        cache: Cache,
        layout: Layout,
        given: Ration,
        batch_size: int,
        wishes: Iterator[Wishes],
        in_parts: int = 0,
    ) -> None:
        """`wishes` is asked by a thread of the stage; `batch_size` is the most samples that are taken at a time.

        Of the first `in_parts` samples, wishes may be for parts of a window: how these lie says nothing of the cache.
        """
        self._cache = cache
        self._layout = layout
        self._ration = given
        self._batch_size = batch_size
        fields = [cache.field(name) for name in layout.fields]
        self._ragged = [field.ragged for field in fields]
        self._arenas = [
            Arena(units, field.shape, cache.dtype(field.name)) for units, field in zip(given.units, fields, strict=True)
        ]
        self._runs: deque[Run] = deque()
        self._planned = 0
        self._flying, self._bytes_flying = 0, 0
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._ranges = Ranges()
        self.tally = Tally()
        self._in_parts = in_parts
        self._remarks = len(cache) * len(fields) >= ENOUGH_ROWS
        self.most_bytes = 0
        """The most memory that slots in use and ranges under way have taken."""
        self.refetched = 0
        """Ranges asked for again because their bytes were not the committed ones."""
        self._unpackers = ThreadPoolExecutor(_UNPACKERS, "kcache-unpack")
        self._planner = threading.Thread(target=self._plan, args=(wishes,), name="kcache-stage", daemon=True)
        self._planner.start()
        atexit.register(self.close)  # of whoever leaves a pass open: later, a program that ends has no modules any more

    @property
    def requests(self) -> int:
        """Requests so far."""
        return self._ranges.requests

    @property
    def held_bytes(self) -> int:
        """Memory of all slots, and what ranges under way may take."""
        return sum(arena.slots.nbytes for arena in self._arenas) + self._ration.flight_bytes

    def close(self) -> None:
        """End what is under way; again, nothing."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._planner.join(LAST_WORD_SECONDS)
        self._ranges.close()
        self._unpackers.shutdown(cancel_futures=True)

    def take(self, first: int, count: int, empty: Empty) -> tuple[dict[str, np.ndarray], Arrival]:
        """The rows of uses `first` to `first` + `count`, as `Cache.read` gives them; waits until they are there.

        Raises CacheCorruptError, StoreError or what else kept rows from coming.
        """
        last = first + count
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._closed or self._has(first, last))
            if not self._has(first, last):
                raise self._failure or CancelledError
            runs = [(run, run.part(first, last)) for run in self._runs]
        runs = [(run, part) for run, part in runs if part.start < part.stop]
        arrival = Arrival(max(float(run.came[part].max()) for run, part in runs), time.perf_counter())
        rows: dict[str, np.ndarray] = {}
        taken = []
        for number, name in enumerate(self._layout.fields):
            bounds = [run.bounds[number][part.start : part.stop + 1] for run, part in runs]
            slots = np.concatenate(
                [run.slots[number][each[0] : each[-1]] for (run, _), each in zip(runs, bounds, strict=True)]
            )
            arena = self._arenas[number].slots
            packed = self._cache.is_packed(name)
            out = (np.empty if packed else empty)((len(slots), *arena.shape[1:]), arena.dtype)
            rows[name] = np.take(arena, slots, axis=0, out=out, mode="clip")
            if self._ragged[number]:
                lengths = np.concatenate([np.diff(each) for each in bounds])
                offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
                if packed:
                    rows[name] = unpacked_rows(self._cache.table_of(name), rows[name], offsets, empty)
                else:
                    rows[OFFSETS] = offsets
            taken.append(slots)
        with self._changed:
            for arena_, slots in zip(self._arenas, taken, strict=True):
                arena_.give_back(slots)
            for run, part in runs:
                run.taken += part.stop - part.start
            while self._runs and self._runs[0].taken == self._runs[0].count:
                self._runs.popleft()
            self._changed.notify_all()
        return rows, arrival

    def _has(self, first: int, last: int) -> bool:
        return last <= self._planned and not any(run.missing[run.part(first, last)].any() for run in self._runs)

    def _plan(self, wishes: Iterator[Wishes]) -> None:
        """Ask for the rows of all `wishes`, in the planner's thread."""
        try:
            for samples, captions, dropped in wishes:
                if self._closed:  # wishes may have no end
                    return
                positions = self._cache.positions(samples, self._layout.fields, captions, **dropped)
                for fetch, run in self._fetches(samples, positions):
                    if not self._wait_for_room(fetch):
                        return
                    self._send(fetch, run, self._reserve(fetch, run), _TRIES)
        except BaseException as error:  # noqa: BLE001 - it is raised where the rows are taken
            self._fail(error)

    def _fetches(self, samples: np.ndarray, positions: dict[str, np.ndarray]) -> Iterator[tuple[Fetch, Run]]:
        """The ranges for one window's samples; what does not fit into the slots at a time, in several runs."""
        rows = self._layout.rows(samples, positions).reshape(len(self._layout.fields), -1)
        units = [
            row["length"] // unit if ragged else np.ones(len(samples), np.int64)
            for row, unit, ragged in zip(rows, self._layout.units, self._ragged, strict=True)
        ]
        for part in self._parts(units):
            run = Run(self._planned, [each[part] for each in units])
            mine = rows[:, part].reshape(-1).copy()
            mine["use"] -= part.start
            counted = self._planned >= self._in_parts
            fetches = plan_fetches(mine, self._ration.most_bytes, self.tally if counted else Tally())
            if self._remarks and (remark := self.tally.remark()) is not None:
                self._remarks = False
                logger.warning("streaming: %s", remark)
            with self._changed:
                self._runs.append(run)
                self._planned += run.count
            yield from ((fetch, run) for fetch in fetches)

    def _parts(self, units: list[np.ndarray]) -> Iterator[slice]:
        """Runs of samples whose rows fit into the slots, beside a batch of which some have not been taken yet."""
        bounds = [np.concatenate([[0], np.cumsum(each)]) for each in units]
        before, begin, count = self._batch_units(), 0, len(units[0])
        while begin < count:
            end = min(
                int(np.searchsorted(each, each[begin] + arena - spare, side="right")) - 1
                for each, arena, spare in zip(bounds, self._ration.units, before, strict=True)
            )
            if end <= begin:
                raise KcacheError("the rows of a batch do not fit into the stage; give more --stage-bytes")
            yield slice(begin, min(end, count))
            begin = end
            before = self._batch_units()

    def _batch_units(self) -> list[int]:
        """Per field, the units of the last samples that were planned, as many as one batch may still have to take."""
        units, first = [0] * len(self._arenas), self._planned - self._batch_size
        with self._changed:
            for run in self._runs:
                part = run.part(first, self._planned)
                units = [
                    held + int(bounds[part.stop] - bounds[part.start])
                    for held, bounds in zip(units, run.bounds, strict=True)
                ]
        return units

    def _wait_for_room(self, fetch: Fetch) -> bool:
        """Wait until `fetch` may be sent; False where nothing is wanted any more."""
        needed = self._units_of(fetch)

        def room() -> bool:
            fits = all(arena.left >= count for arena, count in zip(self._arenas, needed, strict=True))
            light = self._flying == 0 or self._bytes_flying + 2 * fetch.length <= self._ration.flight_bytes
            return self._closed or (fits and light and self._flying < AT_ONCE)

        with self._changed:
            self._changed.wait_for(room)
            return not self._closed and self._failure is None

    def _units_of(self, fetch: Fetch) -> list[int]:
        of_field = [fetch.rows["length"][fetch.rows["field"] == number] for number in range(len(self._arenas))]
        return [
            int(lengths.sum()) // unit if ragged else len(lengths)
            for lengths, unit, ragged in zip(of_field, self._layout.units, self._ragged, strict=True)
        ]

    def _reserve(self, fetch: Fetch, run: Run) -> list[np.ndarray]:
        """Take slots for the rows of `fetch`, field by field, and tell `run` of them."""
        reserved = []
        with self._changed:
            for number, count in enumerate(self._units_of(fetch)):
                slots = self._arenas[number].take(count)
                uses = fetch.rows["use"][fetch.rows["field"] == number].astype(np.int64)
                run.slots[number][token_numbers(run.bounds[number], uses)[0]] = slots
                reserved.append(slots)
            self._flying, self._bytes_flying = self._flying + 1, self._bytes_flying + 2 * fetch.length
            in_use = sum(arena.slots[0].nbytes * (len(arena.slots) - arena.left) for arena in self._arenas)
            self.most_bytes = max(self.most_bytes, in_use + self._bytes_flying)
        return reserved

    def _send(self, fetch: Fetch, run: Run, slots: list[np.ndarray], tries: int) -> None:
        asked = self._ranges.fetch(self._layout.paths[fetch.file], fetch.start, fetch.length)

        def arrived(content: "Future[memoryview]") -> None:
            came = time.perf_counter()
            try:
                with self._changed:  # `close` ends the unpackers after it
                    if not self._closed:
                        self._unpackers.submit(self._receive, content, came, fetch, run, slots, tries)
            except RuntimeError as error:  # the interpreter ends, and waits for whoever waits for rows
                self._fail(error)

        asked.add_done_callback(arrived)

    def _receive(
        self, content: "Future[memoryview]", came: float, fetch: Fetch, run: Run, slots: list[np.ndarray], tries: int
    ) -> None:
        """Put the rows of a range into their slots, or ask for it again."""
        try:
            if (wrong := self._unpack(content.result(), fetch, slots)) is not None:
                if tries == 1:
                    raise self._layout.corrupt(fetch, *wrong)
                self.refetched += 1
                self._send(fetch, run, slots, tries - 1)
                return
            with self._changed:
                uses = fetch.rows["use"]
                np.maximum.at(run.came, uses, came)
                np.subtract.at(run.missing, uses, 1)
                self._flying, self._bytes_flying = self._flying - 1, self._bytes_flying - 2 * fetch.length
                self._changed.notify_all()
        except CancelledError:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised where the rows are taken
            try:
                error = self._layout.explained(error, fetch)
            finally:
                self._fail(error)

    def _unpack(self, content: memoryview, fetch: Fetch, slots: list[np.ndarray]) -> tuple[np.void, str] | None:
        """Copy the rows in `content` into their slots; or say which one is not what was committed, and how."""
        found = np.frombuffer(content, np.uint8)
        for number, into in enumerate(slots):
            rows = fetch.rows[fetch.rows["field"] == number]
            if not len(rows):
                continue
            arena, payloads = self._arenas[number], []
            for place, row in enumerate(rows):
                payload = self._layout.payload(found, fetch, row)
                if (missing := int(row["length"]) - len(payload)) > 0:
                    return row, f"the file ends {missing} bytes before the row does"
                if (checksum := crc32c(payload)) != row["crc32c"]:
                    return row, f"crc32c is {checksum:08x}, expected {int(row['crc32c']):08x}"
                if self._ragged[number]:
                    payloads.append(payload)
                else:
                    arena.bytes[into[place]] = payload
            if payloads:
                arena.bytes[into] = np.concatenate(payloads).reshape(len(into), -1)
        return None

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
