"""Small builds in processes of their own, which can be killed at any step of their writing.

Every builder is a fork of this process, which has imported everything and loaded the encoders but computed nothing, so
that a kill lands in the build.
"""

import dataclasses
import functools
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import torch
from PIL import Image

import kcache.build.encode  # imported before the first fork: a builder then starts at once
import kcache.encoders.decoding
import kcache.encoders.frozen
from kcache.build.build import build_cache
from kcache.build.survey import survey
from kcache.config import BuildConfig
from kcache.demo.digits import on_paper, write_digits
from kcache.demo.tiny import demo_models
from kcache.encoders.pretrained import provenance
from kcache_cli import app

PICTURES = 6
PAPERS = ((32, 64), (64, 32), (32, 32))
"""Heights and widths of the paper that digits are on, in turn, where shapes are asked for."""


@dataclass
class Steps:
    """Counts the steps of a builder's writing; at the step `kill_at` the builder kills itself.

    A subclass says in `watch` what the steps are.
    """

    kill_at: int | None
    told: int
    """Descriptor that every step, or only the last one before a kill, is written to, a line each."""
    count: int = 0
    lock: Any = field(default_factory=threading.RLock)

    def at(self, name: str) -> bool:
        """Count one step; returns True where the builder is to end after half of what it is about to write."""
        with self.lock:
            self.count += 1
            if self.kill_at in (None, self.count):
                os.write(self.told, f"{name}\n".encode())
            if self.count == self.kill_at and not name.startswith("half"):
                os.kill(os.getpid(), signal.SIGKILL)
            return self.count == self.kill_at

    def watch(self) -> None:
        """Count every step of this process from now on, before and after."""
        raise NotImplementedError

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*arguments: Any, **named: Any) -> Any:
            self.at(f"before {name}")
            result = call(*arguments, **named)
            self.at(f"after {name}")
            return result

        return counted


@dataclass
class Builder:
    """A builder in a process of its own."""

    pid: int
    told: int

    def end(self) -> tuple[int, list[str]]:
        """Wait for its end: exit code, or minus the signal that ended it, and the lines that it told."""
        with os.fdopen(self.told) as pipe:
            lines = pipe.read().splitlines()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), lines


@dataclass
class Bench:
    """Small pictures, a tiny pair of models, and where the caches go."""

    folder: Path
    steps: type[Steps]
    """What is counted as a step."""
    shapes: bool = False
    """Whether caches have three shapes, mirror images, hints and masks; the headers of some pictures are wrong.

    What such a header says is planned first, and found wrong by decoding: a build has two plans."""

    def __post_init__(self) -> None:
        self.prior, self.decoder = demo_models(self.folder / "models")
        self.pictures, self.changed = self.folder / "pictures", self.folder / "changed"
        write_digits(self.pictures, PICTURES)
        write_digits(self.changed, PICTURES + 2)
        if self.shapes:
            _put_on_papers_with_controls(self.pictures)
            _put_on_papers_with_controls(self.changed)
        metadata = self.changed / "metadata.jsonl"
        lines = [json.loads(line) for line in metadata.read_text().splitlines()]
        lines[1]["text"] = lines[2]["text"]
        (self.changed / lines[3]["file_name"]).write_bytes(b"no picture")
        metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))

    @property
    def _resolution(self) -> int:
        return 16 if self.shapes else 32

    def config(self, form: str, worker: str | None = None) -> BuildConfig:
        """Settings that make two shards of each table, or where there are shapes, of most."""
        return BuildConfig(
            format="zarr" if form == "zarr" else "webdataset",
            resolution=(self._resolution,),
            aspect_ratio_buckets="auto" if self.shapes else None,
            flip=self.shapes or None,
            hint_column=("edges=hint",) if self.shapes else (),
            mask_column="hole" if self.shapes else None,
            dtype="float32",
            batch_size=2,
            num_workers=2,
            rows_per_shard=5,
            device="cpu",
            worker=worker,
            pretrained_prior_model_name_or_path=str(self.prior),
            pretrained_decoder_model_name_or_path=str(self.decoder),
        )

    def preload(self) -> None:
        """Load the encoders once, and what pyarrow loads when it first makes a table; builders take both over."""
        pyarrow.table({"id": ["a"]})
        if self.shapes:
            right = kcache.encoders.decoding.picture_size

            def wrong(content: bytes) -> tuple[int, int]:
                width, height = right(content)
                return (height, width) if len(content) % 2 else (width, height)

            kcache.encoders.decoding.picture_size = wrong
        provenance(torch.device("cpu"))  # which reads the metadata of packages once
        job = survey(str(self.pictures), self.folder / "none", self.config("zarr"), lambda _: None)
        load, device = kcache.encoders.frozen.load_encoder, torch.device("cpu")
        encoders = {r.fingerprint: load(r, job.repository(name), device) for name, r in job.recipes.items()}
        kcache.encoders.frozen.load_encoder = lambda recipe, *_, **__: encoders[recipe.fingerprint]

    def start(
        self, source: Path, cache: Path | str, form: str, *, worker: str | None = None, watch: int = -1
    ) -> Builder:
        """Start a builder; `watch` 0 makes it tell every step, k > 0 kills it at step k.

        A `worker` tells, a line each, how many rows it encoded itself.
        """
        read, write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(write)
            return Builder(pid, read)
        code = 1
        try:
            os.close(read)
            if watch >= 0:
                self.steps(watch or None, write).watch()
            own: dict[str, int] = {}
            config = dataclasses.replace(self.config(form, worker), replace=True)  # other pictures take their place
            build_cache(str(source), str(cache), config, report=lambda now: own.update({now.table: now.done}))
            if worker:
                os.write(write, b"row\n" * sum(own.values()))
            code = 0
        except BaseException as error:
            sys.stderr.write(f"builder {worker or ''}: {error!r}\n")
            raise
        finally:
            os._exit(code)

    def start_command(self, cache: Path | str, form: str) -> Builder:
        """Start `kcache cache-build` as it is typed."""
        config = dataclasses.asdict(self.config(form))
        flags = {name: value for name, value in config.items() if value not in (None, False, ())}
        typed = [
            (name, each) for name, given in flags.items() for each in (given if isinstance(given, tuple) else [given])
        ]
        sys.argv = ["kcache", "cache-build", str(self.pictures), str(cache)]
        sys.argv += [f"--{name}" if value is True else f"--{name}={value}" for name, value in typed]
        read, write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(write)
            return Builder(pid, read)
        code = 1
        try:
            os.dup2(write, 1)
            os.dup2(write, 2)
            app.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def build(self, source: Path, cache: Path | str, form: str) -> None:
        """Build undisturbed; raises RuntimeError when that fails."""
        code, _ = self.start(source, cache, form).end()
        if code:
            raise RuntimeError(f"the builder of {cache} ended with {code}")


def _put_on_papers_with_controls(folder: Path) -> None:
    for path, shape in zip(sorted(folder.glob("*.png")), itertools.cycle(PAPERS), strict=False):
        paper = on_paper(Image.open(path), "white", shape)
        paper.save(path)
        paper.convert("L").save(path.with_suffix(".hint.png"))
    for path in sorted(folder.glob("*[0-9].png"))[::2]:
        hole = Image.open(path).convert("L").point(lambda level: 255 * (level < 128))
        hole.save(path.with_suffix(".hole.png"))
