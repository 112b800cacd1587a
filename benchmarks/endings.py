"""What is left of a run that something happens to: each stop signal, and a disk that fills up, at moments near its end.

Every run trains a tiny network for twelve steps on a small file system in memory. At one of its moments (an optimizer
step, a file that is about to be written) it gets a signal, or the disk is filled to the last byte. Then the result must
be there, bit for bit that of an undisturbed run, or a checkpoint of the last step that was done; nothing half done may
be left; and the same command with --resume-from-checkpoint latest, with room again, must end in the same bytes. It must
be possible to mount a tmpfs.

    python benchmarks/endings.py SOURCE PRIOR DECODER [--few]
"""

import argparse
import hashlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kcache.build import build_cache
from kcache.config import BuildConfig, TrainConfig
from kcache.disk.durable import TEMPORARY_PREFIX
from kcache.errors import KcacheError
from kcache.stopping import STOP_SIGNALS
from kcache.store.checkpoint import latest_checkpoint
from kcache.store.run_directory import LORA_FILE, PIPELINE_FILE
from kcache.training import result, run, trainer

STEPS = 12
DISK_BYTES = 80_000_000
FILLER = "filler"
MOMENTS = (
    (trainer, "take_step"),
    (run, "save_network"),
    (run, "save_checkpoint"),
    (trainer, "write_result"),
    (result, "_save"),
    (result, "export_network"),
    (result, "replace"),
    (result, "export_components"),
    (result, "model_card"),
    (result, "make_pipeline"),
    (result, "plot_run"),
)
"""The calls before which something may happen."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run, and what happens to it."""

    stage: str
    lora: bool
    processes: int
    what: str
    """The name of a signal, or "full": the disk is filled."""
    moment: int
    """Before which of the calls in MOMENTS, counted over the run."""


def settings(output_dir: Path, stage: str, lora: bool, **changes: Any) -> TrainConfig:
    """Those of the runs here: checkpoints on the way, an average for whole networks."""
    chosen = {"max_train_steps": STEPS, "checkpointing_steps": 5, "train_batch_size": 2, "report_to": "none"}
    extra = {"lora_rank": 2} if lora else {"use_ema": True}
    return TrainConfig(stage=stage, output_dir=str(output_dir), **(chosen | extra | changes))  # type: ignore[arg-type]


@contextmanager
def happening(act: Callable[[int, str], None]) -> Iterator[None]:
    """Call `act` with a count and a name before each of the calls in MOMENTS."""
    count = itertools.count()

    def before(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            act(next(count), name)
            return real(*arguments, **named)

        return called

    patches = [patch.object(module, name, before(name, getattr(module, name))) for module, name in MOMENTS]
    for started in patches:
        started.start()
    try:
        yield
    finally:
        for started in patches:
            started.stop()


def fill(disk: Path) -> None:
    """Write into `disk` until nothing more goes into it."""
    with (disk / FILLER).open("ab", buffering=0) as file, suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def weights(run_dir: Path) -> dict[str, str]:
    """Digests of what a run is for: its networks, its adapters, and what makes them a pipeline."""
    names = [
        path for path in run_dir.rglob("*.safetensors") if not path.relative_to(run_dir).parts[0].startswith("check")
    ]
    files = [*names, run_dir / PIPELINE_FILE, run_dir / LORA_FILE]
    return {
        path.relative_to(run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def complaint(run_dir: Path, expected: dict[str, str], done: int) -> str | None:
    """What is wrong with what is left in `run_dir` after `done` steps; None when nothing is."""
    left = [path.name for path in run_dir.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]
    if left:
        return f"left {', '.join(left)}"
    try:
        checkpoint = latest_checkpoint(run_dir)
    except KcacheError as error:
        return str(error)
    if weights(run_dir) != expected and (checkpoint is None or checkpoint.step < done):
        return (
            f"neither the result nor a checkpoint of step {done}; {'none' if checkpoint is None else checkpoint.step}"
        )
    return None


def trained(cache: str, config: TrainConfig, act: Callable[[int, str], None]) -> int:
    """Train, and return what the command would have exited with."""
    try:
        with happening(act):
            trainer.train(cache, config)
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return int(end.code or 0)
    except KcacheError as error:
        print(f"    {error}", file=sys.stderr)
        return error.exit_code
    return 0


def in_processes(count: int, work: Callable[[int], int]) -> list[int]:
    """The exit codes of `work(rank)` in `count` processes forked here, which has loaded the libraries and used none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            if count > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            code = 99
            try:
                code = work(rank)
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def happens(case: Case, cache: str, disk: Path, expected: dict[str, str]) -> str | None:
    """Let `case` happen and go on after it; returns what was not right."""
    run_dir = disk / "run"
    config = settings(run_dir, case.stage, case.lora, train_batch_size=2 // case.processes)
    steps = Path(tempfile.mkdtemp()) / "steps"

    def act(rank: int, count: int, name: str) -> None:
        if rank == 0 and name == "take_step":
            steps.write_text(steps.read_text() + "." if steps.exists() else ".")
        if count == case.moment and rank == (case.processes - 1 if case.what != "full" else 0):
            if case.what == "full":
                fill(disk)
            else:
                os.kill(os.getpid(), signal.Signals[case.what])

    codes = in_processes(case.processes, lambda rank: trained(cache, config, lambda *told: act(rank, *told)))
    done = len(steps.read_text())
    wrong = complaint(run_dir, expected, done)
    allowed = {0, 1} if case.what == "full" else {0, 128 + signal.Signals[case.what]}
    if wrong is None and not allowed.issuperset(codes):
        wrong = f"exited with {codes}"
    (disk / FILLER).unlink(missing_ok=True)
    again = in_processes(
        case.processes,
        lambda rank: trained(cache, replace(config, resume_from_checkpoint="latest"), lambda *_: None),
    )
    if wrong is None and (any(again) or weights(run_dir) != expected):
        wrong = f"going on exited with {again} and ended in other bytes"
    subprocess.run(["rm", "-r", str(run_dir), str(steps.parent)], check=True)
    return wrong


def cases(stage: str, lora: bool, processes: int, moments: int, few: bool) -> Iterator[Case]:
    """Twenty moments of the last ten steps and the end for a full disk, three for each signal; `few`: a sample."""
    about = {"stage": stage, "lora": lora, "processes": processes}
    first = 2
    spread = [first + round(place * (moments - 1 - first) / 19) for place in range(20)]
    for moment in spread[:: 7 if few else 1]:
        yield Case(**about, what="full", moment=moment)  # type: ignore[arg-type]
    for number in STOP_SIGNALS[:: 3 if few else 1]:
        for moment in (spread[3], spread[12], spread[17])[:: 2 if few else 1]:
            yield Case(**about, what=number.name, moment=moment)  # type: ignore[arg-type]


def examine(cache: str, disk: Path, stage: str, lora: bool, processes: int, few: bool) -> tuple[int, list[str]]:
    """How many cases there were, and what went wrong."""
    run_dir, counted = disk / "run", Path(tempfile.mkdtemp()) / "moments"
    config = settings(run_dir, stage, lora, train_batch_size=2 // processes)

    def count(rank: int, number: int) -> None:
        if rank == 0:
            counted.write_text(str(number + 1))

    if any(in_processes(processes, lambda rank: trained(cache, config, lambda number, _: count(rank, number)))):
        raise RuntimeError("the undisturbed run has failed")
    expected, moments = weights(run_dir), int(counted.read_text())
    subprocess.run(["rm", "-r", str(run_dir)], check=True)
    wrong, number = [], 0
    for case in cases(stage, lora, processes, moments, few):
        number += 1
        said = happens(case, cache, disk, expected)
        if said is not None:
            wrong.append(f"{case}: {said}")
            print(wrong[-1], flush=True)
    return number, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per kind of run; 1 when anything was not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "prior", "decoder"):
        parser.add_argument(name)
    parser.add_argument("--few", action="store_true", help="a sample of the moments and signals")
    given = parser.parse_args(arguments)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        disk, cache = Path(scratch) / "disk", str(Path(scratch) / "cache")
        disk.mkdir()
        models = {
            "pretrained_prior_model_name_or_path": given.prior,
            "pretrained_decoder_model_name_or_path": given.decoder,
        }
        build = BuildConfig(resolution=(64,), device="cpu", **models)
        in_processes(1, lambda _: int(build_cache(given.source, cache, build).samples == 0))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(disk)], check=True)
        try:
            print("| stage | network | processes | cases | wrong |\n|---|---|---|---|---|", flush=True)
            for stage, lora, processes in itertools.product(("prior", "decoder"), (False, True), (1, 2)):
                number, wrong = examine(cache, disk, stage, lora, processes, given.few)
                failed = failed or bool(wrong)
                print(
                    f"| {stage} | {'LoRA' if lora else 'whole'} | {processes} | {number} | {len(wrong)} |", flush=True
                )
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
