"""How fast a cache is built, against the same encoders fed with inputs that are already decoded.

    python benchmarks/build.py --output benchmarks/results
    python benchmarks/build.py --model-size full --mixed-precision bf16 --batch-size 32

For every table, three ways take turns:

    encoder alone   inputs wait decoded in memory, rows stay where they come out: no build can be faster
    decoding alone  inputs are decoded by all threads, and nothing else is done
    build           what `kcache cache-build` does: decode, encode and write at the same time; with the share of the
                    encoding thread's time that goes into waiting for inputs, encoding, and waiting for the disk, and
                    into waiting for inputs while enough for a batch are decoded ("held up", in parts of the whole)

Two levers take turns with what they change: captions trimmed to their own length (`--text-padding trimmed`), and MoVQ
with its weights in channels-last order, which no build uses, as it changes the last bits of rows.

CPU time of a row is that of all threads: it hardly moves with the machine's load, and says what decoding takes from an
encoder that runs on the same cores. There a build cannot reach the encoder alone: its limit is their share of the CPU.

A build begins with nothing decoded and ends with a shard to write, so that few images make it look slower than it is.
Then whole builds are timed, once for each form of a cache: loading of the encoders, index and all, but with digests of
files remembered from before. Their limit
is what the encoders alone would take for all rows.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import VQModel
from measuring.device import synchronize
from measuring.record import write_outcome
from measuring.workload import RESOLUTIONS, Workload, add_workload_arguments, open_workload

from kcache.build import build_cache
from kcache.build.encode import encode_shards
from kcache.build.pictures.contents import fetcher, shard_fetcher
from kcache.build.plan import PlannedShard
from kcache.build.survey import Survey, survey
from kcache.build.work.meter import Meter
from kcache.encoders.frozen import Encoder, full_batches, load_encoder
from kcache.encoders.pretrained import load_pretrained
from kcache.machine import default_device, threads_for
from kcache.store.recipe import kind_of

BATCHES_PER_SHARD = 4
"""Enough shards that one is written while the next is encoded, as in a build of many images."""
FORMS = ("zarr", "webdataset")


@dataclass(frozen=True)
class Table:
    """An encoder with its inputs, and the ways to work them off."""

    job: Survey
    name: str
    encoder: Encoder
    meter: Meter
    scratch: Path
    """Where builds write."""

    @property
    def keys(self) -> Sequence[bytes]:
        """Its inputs, in order."""
        return self.job.wanted(self.name)

    @property
    def workers(self) -> int:
        """Threads that decode."""
        return threads_for(self.job.config.num_workers)

    def decode(self) -> list[Any]:
        """All inputs, prepared, and nothing else done meanwhile."""
        fetch, reserved = fetcher(self.job, self.name), kind_of(self.name).reserved

        def prepare(key: bytes) -> Any:
            return self.encoder.reserved() if key == reserved else self.encoder.prepare(fetch(key))

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(prepare, self.keys))

    def build(self) -> None:
        """Decode, encode and write all inputs, as a build does; what is written is removed later, in nobody's time."""
        fetching, folder = shard_fetcher(self.job, self.name), Path(tempfile.mkdtemp(dir=self.scratch))
        encode_shards(
            self.encoder, folder, cut(self.keys, BATCHES_PER_SHARD * self.encoder.batch_size), fetching,
            workers=self.workers, meter=self.meter, done=lambda _: None,
        )  # fmt: skip


class Turn(NamedTuple):
    """What a way took in a round: seconds, and CPU seconds of all threads."""

    seconds: float
    cpu: float


def load_table(job: Survey, name: str, scratch: Path) -> Table:
    """The table `name` of `job`, its encoder loaded."""
    encoder = load_encoder(job.recipes[name], job.repository(name), torch.device(default_device()))
    return Table(job=job, name=name, encoder=encoder, meter=Meter(), scratch=scratch)


def measure_table(job: Survey, name: str, rounds: int, scratch: Path) -> dict[str, Any]:
    """All ways for one table, in turns."""
    start = time.perf_counter()
    table = load_table(job, name, scratch)
    loading = time.perf_counter() - start
    prepared = table.decode()
    encode_all(table.encoder, prepared[: 2 * table.encoder.batch_size])  # the first batches choose kernels
    ways = {
        "encoder alone": lambda: encode_all(table.encoder, prepared),
        "decoding alone": table.decode,
        "build": table.build,
    }
    turns = take_turns(ways, rounds)
    ratios = [
        alone.seconds / built.seconds for alone, built in zip(turns["encoder alone"], turns["build"], strict=True)
    ]
    cpu = {way: statistics.median(turn.cpu for turn in taken) / len(prepared) for way, taken in turns.items()}
    return {
        "rows": len(prepared),
        "loading_seconds": round(loading, 2),
        "rows_per_second": rates(turns, len(prepared)),
        "cpu_milliseconds_per_row": {way: round(seconds * 1e3, 3) for way, seconds in cpu.items()},
        "of_encoder_alone": round(statistics.median(ratios), 3),
        "shares": {stage: round(share, 4) for stage, share in table.meter.shares().items()},
        "held_up": round(table.meter.held_up / sum(table.meter.seconds.values()), 4),
    }


def measure_text_padding(full: Survey, trimmed: Survey, rounds: int, scratch: Path) -> dict[str, Any]:
    """Captions a second, padded to the whole length and trimmed, by the encoder alone and in a build."""
    tables = {"full": load_table(full, "text", scratch), "trimmed": load_table(trimmed, "text", scratch)}
    prepared = tables["full"].decode()
    ways: dict[str, Callable[[], Any]] = {}
    for padding, table in tables.items():
        encode_all(table.encoder, prepared)
        ways[f"encoder alone, {padding}"] = partial(encode_all, table.encoder, prepared)
        ways[f"build, {padding}"] = table.build
    return {
        "mean_tokens": round(statistics.mean(length for _, length in prepared), 1),
        "rows_per_second": rates(take_turns(ways, rounds), len(prepared)),
    }


def measure_channels_last(job: Survey, name: str, rounds: int) -> dict[str, Any]:
    """Pictures a second by MoVQ as it is loaded and with its weights in channels-last order, and how far rows move."""
    recipe, device = job.recipes[name], default_device()
    dtype, path = getattr(torch, recipe.compute_dtype), job.repository(name).path / "movq"
    pixels = torch.rand(recipe.batch_shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    networks = {way: load_pretrained(VQModel, path, dtype).eval().to(device) for way in ("as loaded", "channels last")}
    networks["channels last"].to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode(network: VQModel) -> torch.Tensor:
        latents = network.encode(pixels).latents
        synchronize()
        return latents

    rows = {way: encode(network).float() for way, network in networks.items()}
    ways = {way: partial(encode, network) for way, network in networks.items()}
    moved = (rows["channels last"] - rows["as loaded"]).abs().max() / rows["as loaded"].abs().max()
    return {"rows_per_second": rates(take_turns(ways, 3 * rounds), len(pixels)), "largest_difference": float(moved)}


def measure_levers(job: Survey, trimmed: Survey, rounds: int, scratch: Path) -> dict[str, Any]:
    """What could be faster, against what is."""
    latents = next((name for name in job.recipes if name.startswith("latents-")), None)
    found = {"text_padding": measure_text_padding(job, trimmed, rounds, scratch)} if "text" in job.recipes else {}
    return found | ({"channels_last": measure_channels_last(job, latents, rounds)} if latents else {})


def rates(turns: Mapping[str, Sequence[Turn]], rows: int) -> dict[str, float]:
    """Rows per second of each way, by its median round."""
    return {way: round(rows / statistics.median(turn.seconds for turn in taken), 2) for way, taken in turns.items()}


def encode_all(encoder: Encoder, prepared: Sequence[Any]) -> None:
    """Rows of all `prepared` inputs, which are dropped."""
    for batch in full_batches(encoder, enumerate(prepared)):
        encoder.encode([given for _, given in batch])
    synchronize()


def cut(keys: Sequence[bytes], rows: int) -> Iterator[PlannedShard]:
    """`keys` as shards of `rows` rows."""
    for number, start in enumerate(range(0, len(keys), rows)):
        yield PlannedShard(name=f"{number:05d}", keys=tuple(keys[start : start + rows]))


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Turn]]:
    """What each way took in each round."""
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            work()
            turns[way].append(Turn(time.perf_counter() - start, time.process_time() - cpu))
    return turns


def measure_build(workload: Workload, arguments: argparse.Namespace, form: str, limit: float) -> dict[str, Any]:
    """A whole build in the form `form`; `limit` is what the encoders alone take for it, in seconds."""
    config = workload.build_config(
        arguments.stage, arguments.resolution, arguments.batch_size, arguments.mixed_precision, form
    )
    with tempfile.TemporaryDirectory(dir=workload.folder) as scratch:
        cache = Path(scratch) / "cache"
        start = time.perf_counter()
        built = build_cache(str(workload.pictures), str(cache), config)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return {
        "samples": built.samples,
        "seconds": round(seconds, 2),
        "images_per_second": round(built.samples / seconds, 2),
        "of_encoders_alone": round(limit / seconds, 3),
        "bytes": size,
    }


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    print(
        f"{'rows per second':16}{'encoder':>10}{'decoding':>10}{'build':>10}{'of encoder':>12}   waiting for inputs,",
        end="",
    )
    print(" encoding, waiting for the disk; held up")
    for name, row in results["tables"].items():
        rates = "".join(f"{rate:>10,.1f}" for rate in row["rows_per_second"].values())
        print(
            f"{name:16}{rates}{row['of_encoder_alone']:>12}   {', '.join(f'{s:.1%}' for s in row['shares'].values())}"
            f"; {row['held_up']:.1%}; CPU ms a row "
            + ", ".join(f"{way} {ms:.2f}" for way, ms in row["cpu_milliseconds_per_row"].items())
        )
    for lever, row in results["levers"].items():
        print(f"{lever}: {', '.join(f'{way} {rate:,.1f}' for way, rate in row['rows_per_second'].items())} a second")
    for form, row in results["builds"].items():
        print(f"{form}: {row['samples']} samples in {row['seconds']} s, {row['images_per_second']} a second, ", end="")
        print(f"{row['of_encoders_alone']} of the encoders alone, {row['bytes']:,} bytes")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser, images=256)
    parser.add_argument("--stage", choices=("prior", "decoder", "all"), default="all")
    parser.add_argument("--resolution", type=int, help="default 128, 768 with --model-size full")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the JSON: a file or a folder")
    arguments = parser.parse_args(given)
    arguments.resolution = arguments.resolution or RESOLUTIONS[arguments.model_size]
    with open_workload(arguments) as workload:
        config = workload.build_config(
            arguments.stage, arguments.resolution, arguments.batch_size, arguments.mixed_precision
        )
        job, trimmed = (
            survey(str(workload.pictures), workload.folder / "none", settings, lambda _: None)
            for settings in (config, replace(config, text_padding="trimmed"))
        )
        with tempfile.TemporaryDirectory(dir=workload.folder) as folder:
            scratch = Path(folder)
            tables = {name: measure_table(job, name, arguments.rounds, scratch) for name in job.recipes}
            levers = measure_levers(job, trimmed, arguments.rounds, scratch)
        limit = sum(row["rows"] / row["rows_per_second"]["encoder alone"] for row in tables.values())
        results = {
            "tables": tables,
            "levers": levers,
            "builds": {form: measure_build(workload, arguments, form, limit) for form in FORMS},
        }
    show(results)
    write_outcome(arguments.output, "build", vars(arguments), results, "full" if arguments.model_size == "full" else "")


if __name__ == "__main__":
    main()
