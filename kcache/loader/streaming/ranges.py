"""Ranges of files, many asked for at a time: one thread waits for all those of a bucket, a few read those of a disk."""

import asyncio
import os
import statistics
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future, wait

from kcache.errors import StoreError
from kcache.places.bucket import BucketPath
from kcache.places.client import told
from kcache.places.place import Place
from kcache.stopping import LAST_WORD_SECONDS, Crew

_READERS = 8
"""Threads that read from a disk."""
_SLOW, _KNOWN = 4.0, 16
"""A request is asked a second time when it takes so many times the median of those before it, of which so many must be
known: now and then a store forgets one, and whoever waits for the slowest of hundreds always waits for that."""
_LEAST_PATIENCE = 0.2
"""Seconds before that: of a store near by, four times the median is some milliseconds, which say nothing."""
_REMEMBERED = 64


class Ranges:
    """Fetches ranges in the background; how many are asked for at a time is the caller's to decide.

    It belongs to the process that made it, as neither threads nor connections survive a fork. Threads may share it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._readers: Crew | None = None
        self._lock = threading.Lock()
        self._closed = False
        # By the power of two of the length: a long one may well take four times as long as a short one.
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self.requests = 0
        """Ranges asked for, those asked for twice counted twice."""
        self.hedged = 0
        """Ranges asked for a second time, as the first answer was slow."""

    def fetch(self, path: Place, start: int, length: int) -> "Future[memoryview]":
        """`length` bytes of `path` from byte `start` on, fewer where it ends before.

        The future's exception is FileNotFoundError, OSError, or StoreError of a bucket. Raises StoreError in a process
        that was forked from the one that made this, and after `close`.
        """
        with self._lock:
            if os.getpid() != self._process:
                raise StoreError(
                    f"{path} was asked for in a process forked from the one that reads; expected that one, as "
                    "connections do not survive a fork; start the process by spawn, or open the cache in it"
                )
            if self._closed:
                raise StoreError(f"{path} was asked for after reading had ended; expected it to be asked for before")
            if not (isinstance(path, BucketPath) and hasattr(path.store, "get_range_async")):
                if self._readers is None:
                    self._readers = Crew(_READERS, "kcache-ranges")
                self.requests += 1
                return self._readers.submit(_read, path, start, length)
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="kcache-ranges", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(self._hedged(path, start, length), self._loop)

    def close(self) -> None:
        """Give up what is still under way and end the threads, but those that hang; in a forked process, nothing."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
        if self._readers is not None:
            self._readers.close()
        if self._loop is not None and self._thread is not None and not self._loop.is_closed():
            wait([asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)], LAST_WORD_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(LAST_WORD_SECONDS)
            if not self._thread.is_alive():
                self._loop.close()

    async def _hedged(self, path: BucketPath, start: int, length: int) -> memoryview:
        begun = time.monotonic()
        before = self._seconds[length.bit_length()]
        patience = max(_SLOW * statistics.median(before), _LEAST_PATIENCE) if len(before) >= _KNOWN else None
        asked = {self._ask(path, start, length)}
        try:
            done, _ = await asyncio.wait(asked, timeout=patience)
            if not done:
                self.hedged += 1
                asked.add(self._ask(path, start, length))
                done, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                if waiting and all(task.exception() is not None for task in done):
                    done, _ = await asyncio.wait(waiting)  # the other one may still do
            good = [task for task in done if task.exception() is None]
            content = (good or list(done))[0].result()
        finally:
            for task in asked:
                task.cancel()
        before.append(time.monotonic() - begun)
        return content

    def _ask(self, path: BucketPath, start: int, length: int) -> "asyncio.Task[memoryview]":
        self.requests += 1
        return asyncio.ensure_future(_request(path, start, length))


async def _request(path: BucketPath, start: int, length: int) -> memoryview:
    with told(path):
        return memoryview(await path.store.get_range_async(path.key, start=start, length=length))


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _read(path: Place, start: int, length: int) -> memoryview:
    if isinstance(path, BucketPath):  # of a store that is asked one request at a time
        return path.read_range(start, length)
    content, filled = memoryview(bytearray(length)), 0
    with path.open("rb", buffering=0) as file:
        while filled < length and (read := os.preadv(file.fileno(), [content[filled:]], start + filled)):
            filled += read
    return content[:filled]
