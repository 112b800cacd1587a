"""How long a run takes from its command to its first optimizer step, from a cache and with encoders in the loop.

    python benchmarks/startup.py --output startup.json

Each start is a process of its own that trains for one step, timed from outside to the moment when the step is done. The
two ways take turns; the first start of all is left out, as it warms the page cache and remembers digests. Networks are
the demo's unless --prior and --decoder name others. Then what `import kcache` and `kcache --help` take of a processor,
beside `import numpy`, without which neither can do. Prints tables and writes JSON.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measuring.record import machine

from kcache.build.build import build_cache
from kcache.config import BuildConfig
from kcache.demo.digits import SIDE, write_digits
from kcache.demo.tiny import demo_models

START = """
import sys, time
from kcache.config import TrainConfig
from kcache.training.trainer import train
imported = time.monotonic()
stage, cache, output, online = sys.argv[1:]
config = TrainConfig(stage=stage, output_dir=output, online=online or None, max_train_steps=1, report_to="none")
train(cache, config, report=lambda progress: print(imported, time.monotonic()))
"""


def start(stage: str, cache: Path, output: Path, online: str) -> dict[str, float]:
    """Seconds from the start of a process to its imports, from there to its first step, and both."""
    before = time.monotonic()
    command = [sys.executable, "-c", START, stage, str(cache), str(output), online]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    imported, stepped = map(float, told.split())
    return {"imports": imported - before, "first step": stepped - imported, "all": stepped - before}


def processor_seconds(command: Sequence[str | Path], rounds: int) -> float:
    """Processor time of the best of some runs of `command`: what it takes however busy the machine is."""
    taken = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return round(min(taken), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=SIDE)
    parser.add_argument("--prior", help="folder or Hub id; the demo's when left out")
    parser.add_argument("--decoder", help="folder or Hub id; the demo's when left out")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    seconds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["KCACHE_HOME"] = str(folder / "home")
        write_digits(folder / "pictures", arguments.images)
        prior, decoder = demo_models(folder / "models")
        config = BuildConfig(
            resolution=(arguments.resolution,),
            pretrained_prior_model_name_or_path=arguments.prior or str(prior),
            pretrained_decoder_model_name_or_path=arguments.decoder or str(decoder),
        )
        build_cache(str(folder / "pictures"), str(folder / "cache"), config)
        for number in range(arguments.rounds + 1):
            for stage in ("prior", "decoder"):
                for way, online in (("cached", ""), ("online", str(folder / "pictures"))):
                    output = folder / f"{stage}-{way}-{number}"
                    times = start(stage, folder / "cache", output, online)
                    if number:
                        seconds.setdefault(f"{stage}, {way}", []).append(times)
    results = {
        name: {part: round(statistics.median(times[part] for times in runs), 2) for part in runs[0]}
        for name, runs in seconds.items()
    }
    print(f"{'':18}{'imports':>10}{'first step':>12}{'all':>8}  seconds")
    for name, row in results.items():
        print(f"{name:18}{row['imports']:>10}{row['first step']:>12}{row['all']:>8}")
    commands: dict[str, Sequence[str | Path]] = {
        "import numpy": [sys.executable, "-c", "import numpy"],
        "import kcache": [sys.executable, "-c", "import kcache"],
        "kcache --help": [sys.executable, "-m", "kcache_cli", "--help"],
    }
    quick = {name: processor_seconds(command, arguments.rounds) for name, command in commands.items()}
    for name, taken in quick.items():
        print(f"{name:18}{taken:>26}  seconds of processor time")
    settings = {"images": arguments.images, "rounds": arguments.rounds, "resolution": arguments.resolution}
    if arguments.output:
        report = {
            "benchmark": "startup",
            "machine": machine(),
            "settings": settings,
            "results": results,
            "processor_seconds": quick,
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
