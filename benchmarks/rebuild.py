"""What a build knows of a source of many samples, beside a cache that has them: time and memory of each step.

    python benchmarks/rebuild.py --samples 1000000

Nothing is read or encoded: the pictures of the source are a few letters each, with a caption of its own, made up when
they are asked for. The cache has the list of them and no rows. One in a hundred has another caption, and one another
picture, than in the cache. It is measured in a process of its own: its peak of memory, imports and all and what it
maps of files, and what of its memory no file gives back.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from measuring.record import write_outcome

from kcache.build.build import checked_survey
from kcache.build.pictures.sizes import PictureSizes
from kcache.build.survey import missing_rows
from kcache.config import BuildConfig
from kcache.demo.tiny import demo_models
from kcache.disk.memo import DigestMemo
from kcache.engines.tasks import task_maker
from kcache.store.digests import caption_key, content_key
from kcache.store.formats.columns import Sample
from kcache.store.manifest import Manifest, write_manifest
from kcache.store.samples import Refusal, with_ids, write_samples

SHARDS = 20
"""Of each table, tasks are made of so many shards."""


class MadeUp:
    """A source of as many samples: of `changed` ones a hundredth is not what it would be otherwise."""

    refused: Sequence[Refusal] = ()

    def __init__(self, samples: int, *, changed: bool) -> None:
        self.description = f"{samples:,} samples that are made up"
        self._samples = samples
        self._changed = changed

    def __len__(self) -> int:
        return self._samples

    def name(self, i: int) -> str:
        return f"{i // 10_000:05d}/{i % 10_000:04d}.png"

    def captions(self, i: int) -> tuple[str, ...]:
        return (f"picture {i}, edited" if self._changed and i % 100 == 1 else f"picture {i}",)

    def image(self, i: int) -> bytes:
        return b"new %d" % i if self._changed and i % 100 == 2 else b"%d" % i

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        return content_key(self.image(i))


def made_samples(source: MadeUp) -> Iterator[Sample]:
    """The samples of a source as a cache has them."""
    for i in range(len(source)):
        captions = source.captions(i)
        yield Sample(
            name=source.name(i), image_key=content_key(source.image(i)), captions=captions,
            caption_keys=tuple(map(caption_key, captions)), width=64, height=48,
        )  # fmt: skip


def write_cache(cache: Path, samples: int) -> None:
    """A finished cache of the samples, of which no table has a row."""
    cache.mkdir()
    digest, file_digest = write_samples(cache, with_ids(list(made_samples(MadeUp(samples, changed=False)))))
    manifest = Manifest(
        format="zarr", tables={}, samples=samples, samples_digest=digest, samples_file_digest=file_digest,
        index_digest="0" * 64, rejected=0, rejected_digest="0" * 64, models={},
    )  # fmt: skip
    write_manifest(cache, manifest, None)


def memory() -> dict[str, int]:
    """The most memory that this process has taken so far, and what it now has that no file gives back."""
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(told[line].split()[0]) << 10 for name, line in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


def measure(scratch: Path, samples: int) -> dict[str, dict[str, float]]:
    """Each step's seconds, and the peak of memory behind it."""
    prior, decoder = (scratch / "models" / f"kandinsky-2-2-{name}" for name in ("prior", "decoder"))
    config = BuildConfig(
        resolution=(32,), pretrained_prior_model_name_or_path=str(prior),
        pretrained_decoder_model_name_or_path=str(decoder), device="cpu",
    )  # fmt: skip
    results, start = {"begin": {"seconds": 0.0, **memory()}}, time.perf_counter()

    def done(step: str) -> None:
        nonlocal start
        results[step] = {"seconds": time.perf_counter() - start, **memory()}
        start = time.perf_counter()

    with mock.patch("kcache.build.survey.open_source", return_value=MadeUp(samples, changed=True)):
        job = checked_survey("made up", str(scratch / "cache"), config, lambda _: None)
    done("survey")
    plan = missing_rows(job, job.committed().tables, retry=False, seen={})
    done("plan")
    for table in plan.tables:
        make = task_maker(job, table.recipe)
        for shard in table.shards[:SHARDS]:
            task = make(shard)
            assert len(task.pictures) + len(task.captions) >= len(shard.keys) - 1  # noqa: S101  # the reserved row
    done("tasks")
    PictureSizes(job, lambda _: None).measured(job.samples)
    done("sizes")
    assert len(job.leaving.changed) == len(job.leaving) == len(range(2, samples, 100))  # noqa: S101
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args()
    if arguments.scratch:
        print(json.dumps(measure(arguments.scratch, arguments.samples)))
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ["KCACHE_HOME"] = folder
        demo_models(scratch / "models")
        write_cache(scratch / "cache", arguments.samples)
        words = [sys.executable, __file__, "--samples", str(arguments.samples), "--scratch", folder]
        results: dict[str, Any] = json.loads(
            subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
        for name, found in results.items():
            peak, now = (found[kind] / 1e6 for kind in ("peak", "anonymous"))
            print(f"{name}: {found['seconds']:,.1f} s, peak {peak:,.0f} MB, anonymous {now:,.0f} MB", flush=True)
    write_outcome(arguments.output, "rebuild", vars(arguments), results, str(arguments.samples))


if __name__ == "__main__":
    main()
