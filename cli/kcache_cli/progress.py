"""What the user sees while a command runs: data on stdout, progress and notes on stderr.

On a terminal, progress is one live bar; elsewhere a plain line now and then, so that a log stays readable.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from kcache.tally import counted

if TYPE_CHECKING:
    from kcache.build import BuildProgress
    from kcache.store import Manifest
    from kcache.training import Progress as TrainProgress

PLAIN_SECONDS = 10.0
"""Seconds between two lines of progress where there is no terminal."""


def write_any_text() -> None:
    """Have stdout and stderr write what their encoding lacks, an × or a file name of another script, as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # none, or something else, where another program has replaced it
            with suppress(OSError):  # what it still had cannot be written: said when it ends
                stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print data, on stdout."""
    print(text)  # noqa: T201


def say_manifest(new: str, manifest: "Manifest", as_json: bool) -> None:
    """Print what the finished cache `new` came to, as JSON or in a line."""
    size = sum(entry.bytes for entry in manifest.tables.values())
    if as_json:
        about = {"cache": new, "format": manifest.format, "samples": manifest.samples, "bytes": size}
        say(json.dumps({**about, "fingerprint": manifest.fingerprint}, indent=2))
    else:
        say(f"{new}: {counted(manifest.samples, 'sample')}, {bytes_text(size)}, {manifest.format}")


def note(text: str) -> None:
    """Print a remark, on stderr."""
    print(text, file=sys.stderr)  # noqa: T201


def bytes_text(count: int) -> str:
    """Bytes for people, in powers of ten: "25.1 MB"."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def duration_text(seconds: float) -> str:
    """Seconds for people: "0.4 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def rate_text(rate: float, what: str = "") -> str:
    """How many of `what`, a "row", a second, for people, or how long one takes: "500 rows/s", "12.3 s/row"."""
    if 0 < rate < 1:
        return duration_text(1 / rate) + (f"/{what}" if what else " each")
    return (f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}") + (f" {what}s/s" if what else "/s")


def left_text(done: float, total: float, rate: float) -> str:
    """What time is left at `rate` a second, to be put behind something: ", 3 min 20 s left"; "" where none is known."""
    return f", {duration_text((total - done) / rate)} left" if rate > 0 and done < total else ""


class Report:
    """One live bar on a terminal, else a line at most every PLAIN_SECONDS."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,}{task.fields[unit]}"),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed = -PLAIN_SECONDS
        self._begun: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def rate(self, name: str, done: int) -> float:
        """Steps a second of the work called `name` since this was first asked; 0.0 where that is not known yet."""
        now = time.monotonic()
        begun, before = self._begun.setdefault(name, (now, done))
        return (done - before) / (now - begun) if now > begun else 0.0

    def show(self, name: str, done: int, total: int, detail: str, unit: str = "") -> None:
        """Say that `done` of `total` steps, or `unit`s, of the work called `name` are done.

        `detail` has the rate and the time left: a bar's own estimate would know nothing of steps that take long.
        """
        unit = f" {unit}" if unit else ""
        if self._console.is_terminal:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=total, detail=detail, unit=unit)
            self._bar.update(self._tasks[name], completed=done, total=total, detail=detail)
        elif done == total or time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            note(f"{name}: {done:,} of {total:,}{unit}, {detail}")

    def note(self, text: str) -> None:
        """Print a remark above the bar."""
        if self._console.is_terminal:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            note(text)


def show_build(report: Report, progress: "BuildProgress") -> None:
    """Per table: how many rows are done, rows per second, what the time goes to, and what time is left."""
    if progress.total:
        rate = progress.done / progress.seconds if progress.seconds else 0.0
        busy = ", ".join(f"{name} {share:.0%}" for name, share in progress.busy.items())
        detail = rate_text(rate, "row") + (f" ({busy})" if busy else "")
        detail += left_text(progress.done, progress.total, rate) + (f", by {progress.who}" if progress.who else "")
        report.show(progress.table, progress.done, progress.total, detail)


def show_training(report: Report, stage: str, progress: "TrainProgress") -> None:
    """Per optimizer step: loss, learning rate, speed, what was waited for, from 1 % on, and time left."""
    rate = rate_text(progress.samples_per_second, "sample")
    detail = f"loss {progress.loss:.4f}, lr {progress.lr:.1e}, {rate}"
    for what, share in progress.waits.items():
        if share >= 0.01:
            detail += f", waiting for {'the store' if what == 'store' else what}: {share:.0%}"
    steps = report.rate(stage, progress.step)  # of this start's own, validations and checkpoints among them
    if 0 < steps < 1:
        detail += f", {rate_text(steps, 'step')}"
    detail += left_text(progress.step, progress.max_steps, steps)
    report.show(stage, progress.step, progress.max_steps, detail)


def show_counts(report: Report, noun: str) -> Callable[[str, int, int], None]:
    """What shows, by name, how many rows, samples or files are done, how many in a second, and what time is left."""
    last = time.monotonic()
    begun: dict[str, float] = {}

    def show(name: str, done: int, total: int) -> None:
        nonlocal last
        start = begun.setdefault(name, last)  # where the one before it ended
        last = time.monotonic()
        rate = done / max(last - start, 1e-9)
        report.show(name, done, total, f"{noun}, {rate_text(rate)}{left_text(done, total, rate)}")

    return show
