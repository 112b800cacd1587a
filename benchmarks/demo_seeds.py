"""The demo with several seeds, and with encoders that never saw what is asked for: how right, how fast, how varied.

    python benchmarks/pretrain_demo.py --strict-control --towers-steps 1200 --movq-steps 700 --output /tmp/control
    python benchmarks/demo_seeds.py --control /tmp/control --output benchmarks/results

Runs `kcache demo` for each seed, and with the encoders of the folder --control for the first seed: no network of that
run, frozen ones included, saw a held-out digit in its ink. Each demo is a process of its own, timed from outside
too. Prints a table, writes JSON and, where --output is a folder, the first demo's picture beside it; --folder keeps
what all demos made. --forms trains from webdataset tars and with the encoders in the loop, too, and compares every
loss. --quick does it with `kcache demo --quick`, without the picture.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring.device import device_kind
from measuring.record import write_outcome

DEMO = """
import sys
from pathlib import Path
from kcache.demo.run import QUICK, WHOLE, run_demo
from kcache.demo.tiny import WEIGHTS
output, seed, quick, encoders, form = sys.argv[1:]
run_demo(
    Path(output), QUICK if quick else WHOLE, say=print, seed=int(seed),
    encoders=Path(encoders) if encoders else WEIGHTS,
    format="webdataset" if form == "webdataset" else "zarr", online=form == "online",
)
"""
HEAD = ("", "seconds", "digit", "ink", "paper", "all three", "ceiling", "spread", "real", "to known", "real")


def run(output: Path, seed: int, quick: bool, encoders: Path | None = None, form: str = "zarr") -> dict[str, Any]:
    """What one demo measured, without the lists of losses and files; `form` is a cache's, or "online"."""
    given = (str(output), str(seed), "quick" if quick else "", str(encoders or ""), form)
    command = [sys.executable, "-c", DEMO, *given]
    start = time.perf_counter()
    # As `kcache demo` sets it: threads that spin make a busy machine several times slower.
    subprocess.run(command, check=True, stdout=sys.stderr, env={"OMP_NUM_THREADS": "1"} | os.environ)
    wall = time.perf_counter() - start
    result = json.loads((output / "result.json").read_text())
    stages = {
        stage["stage"]: {
            "steps": len(stage["cached"]["losses"]),
            "cached_images_per_second": stage["cached"]["samples_per_second"],
            "online_images_per_second": stage["online"]["samples_per_second"],
            **compared,
        }
        for stage, compared in zip(result["stages"], result["compared"], strict=True)
    }
    exam = {name: value for name, value in result["exam"].items() if name != "drawn"}
    training = json.loads((encoders / "training.json").read_text()) if encoders else {}
    facts = {name: result[name] for name in ("seed", "size", "images", "captions", "build_seconds", "cache_bytes")}
    return facts | {
        "encoders": {name: {key: entry[key] for key in entry if key != "log"} for name, entry in training.items()},
        "wall_seconds": wall,
        "demo_seconds": result["total_seconds"],
        "seconds": result["seconds"],
        "stages": stages,
        "exam": exam,
    }


def losses(output: Path) -> list[float]:
    """Every loss of both networks of the demo in `output`."""
    stages = json.loads((output / "result.json").read_text())["stages"]
    return [loss for stage in stages for loss in max((stage[way]["losses"] for way in ("cached", "online")), key=len)]


def row(name: str, found: dict[str, Any]) -> list[str]:
    """A demo's line of the table."""
    exam = found["exam"]
    score = exam["score"]
    shares = [score[part] for part in ("digit", "ink", "paper", "everything")] + [exam["ceiling"]["everything"]]
    drawn, real = exam["drawn_variety"], exam["real_variety"]
    varied = [drawn["spread"], real["spread"], drawn["to_known"], real["to_known"]]
    seconds = f"{found['wall_seconds']:.0f}"
    return [name, seconds, *(f"{share:.1f}" for share in shares), *(f"{value:.3f}" for value in varied)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--control", type=Path, help="folder of pretrain_demo.py --strict-control")
    parser.add_argument("--forms", action="store_true", help="the first seed also from webdataset tars, and online")
    parser.add_argument("--quick", action="store_true", help="run `kcache demo --quick`")
    parser.add_argument("--folder", type=Path, help="keep what the demos made here")
    parser.add_argument("--output", type=Path, help="file or folder for the JSON")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        for seed in arguments.seeds:
            results[f"seed {seed}"] = run(folder / f"seed-{seed}", seed, arguments.quick)
        for form in ("webdataset", "online") if arguments.forms else ():
            seed = arguments.seeds[0]
            results[form] = run(folder / form, seed, arguments.quick, form=form)
            pairs = zip(losses(folder / form), losses(folder / f"seed-{seed}"), strict=True)
            results[form]["largest_difference_of_losses"] = max(abs(one - other) for one, other in pairs)
        if arguments.control is not None:
            seed = arguments.seeds[0] if arguments.seeds else 0
            results["strict control"] = run(folder / "control", seed, arguments.quick, arguments.control.resolve())
        whole = bool(arguments.seeds) and not arguments.quick
        if whole and arguments.output is not None and arguments.output.is_dir():
            picture = arguments.output / f"demo-{device_kind()}.png"
            shutil.copyfile(folder / f"seed-{arguments.seeds[0]}" / "demo.png", picture)
    print(f"| {' | '.join(HEAD)} |\n|---|{'---:|' * (len(HEAD) - 1)}")
    for name, found in results.items():
        print(f"| {' | '.join(row(name, found))} |")
    for name, found in results.items():
        if "largest_difference_of_losses" in found:
            print(f"{name}: losses differ by at most {found['largest_difference_of_losses']} from those from zarr")
    write_outcome(arguments.output, "demo", vars(arguments), results, "quick" if arguments.quick else "")


if __name__ == "__main__":
    main()
