"""How far training from a cache is from training with the encoders in the loop, on this machine.

    python benchmarks/parity.py --output parity.json

For each way of computing and storing, builds a cache of the demo's pictures with its tiny models, trains both stages
for some steps from it and with the encoders in the loop, and prints the largest difference of any step's loss, relative
to the loss, and the largest difference of any final weight. A second pair of columns compares the cached run with
encoders in the loop that compute in float32: what the precision costs, cache or not.
"""

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from measuring.record import machine
from safetensors.torch import load_file

from kcache.build.build import build_cache
from kcache.config import BuildConfig, MixedPrecision, TrainConfig
from kcache.demo.digits import SIDE, write_digits
from kcache.demo.tiny import demo_models
from kcache.store.run_directory import read_metrics
from kcache.training.trainer import train

CASES: tuple[tuple[MixedPrecision, Literal["float16", "float32"]], ...] = (
    ("no", "float32"),
    ("no", "float16"),
    ("fp16", "float16"),
    ("bf16", "float16"),
    ("bf16", "float32"),
)
"""(--mixed-precision, --dtype) of cache-build."""
Network = Literal["prior", "decoder"]
NETWORKS: dict[Network, str] = {"prior": "prior", "decoder": "unet"}


def run(stage: Network, cache: Path, output: Path, steps: int, online: str | None) -> Path:
    """Train one stage; returns its run directory."""
    config = TrainConfig(
        stage=stage, output_dir=str(output), online=online, train_batch_size=8, max_train_steps=steps,
        learning_rate=1e-4, checkpointing_steps=steps + 1,
    )  # fmt: skip
    train(str(cache), config)
    return output


def difference(stage: Network, first: Path, second: Path) -> dict[str, float]:
    """Largest relative difference of a loss, and largest difference of a final weight."""
    losses = [[entry["loss"] for entry in read_metrics(path)] for path in (first, second)]
    file = Path(NETWORKS[stage]) / "diffusion_pytorch_model.safetensors"
    a, b = load_file(first / file), load_file(second / file)
    return {
        "loss": max(abs(x - y) / abs(y) for x, y in zip(*losses, strict=True)),
        "weight": max(float((a[name].float() - b[name].float()).abs().max()) for name in a),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures = folder / "pictures"
        write_digits(pictures, arguments.images)
        prior, decoder = demo_models(folder / "models")
        exact: dict[str, Path] = {}
        for precision, dtype in CASES:
            name = f"{precision}-{dtype}"
            config = BuildConfig(
                resolution=(SIDE,), dtype=dtype, mixed_precision=precision, device=arguments.device,
                pretrained_prior_model_name_or_path=str(prior), pretrained_decoder_model_name_or_path=str(decoder),
            )  # fmt: skip
            build_cache(str(pictures), str(folder / name), config)
            for stage in NETWORKS:
                output = folder / f"{name}-{stage}"
                cached = run(stage, folder / name, output / "cached", arguments.steps, None)
                online = run(stage, folder / name, output / "online", arguments.steps, str(pictures))
                exact.setdefault(stage, online)
                rows.append(
                    {
                        "stage": stage,
                        "encoders": {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision],
                        "rows": dtype,
                        "against online": difference(stage, cached, online),
                        "against float32 online": difference(stage, cached, exact[stage]),
                    }
                )
                print_row(rows[-1], first=len(rows) == 1)
    if arguments.output:
        settings = {"images": arguments.images, "steps": arguments.steps, "device": arguments.device}
        report = {"benchmark": "parity", "machine": machine(), "settings": settings, "results": rows}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def print_row(row: dict[str, Any], *, first: bool) -> None:
    """One line of the table, after its head if it is the first."""
    widths = [0, 10, 21, 31, 46, 60]
    if first:
        print("stage     encoders   rows      same encoders in loop:        float32 encoders in loop:")
        print("                               loss           weight        loss           weight")
    cells = [row["stage"], row["encoders"], row["rows"]]
    cells += [
        f"{row[pair][what]:.1e}" for pair in ("against online", "against float32 online") for what in ("loss", "weight")
    ]
    widths = [b - a for a, b in pairwise([*widths, 75])] + [0]
    print("".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)


if __name__ == "__main__":
    main()
