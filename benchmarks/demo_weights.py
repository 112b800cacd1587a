"""The demo with weights that learn in bfloat16 and 8-bit states of AdamW, against float32: how right its pictures are.

    python benchmarks/demo_weights.py --output benchmarks/results

For each seed runs `kcache demo`, trains both networks again from the cache that it built, with `--weights bf16
--mixed-precision bf16 --optimizer adamw-8bit`, and lets them sit the same exam.

A CPU that has no units for it multiplies bfloat16 tens of times more slowly than float32. On CPUs products of matrices
and convolutions are therefore taken in float32 and rounded: from bfloat16, summed in float32, rounded once, as GPUs do.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring.record import write_outcome
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kcache.demo.exam import questions, sit_exam
from kcache.demo.run import QUICK, WHOLE, run_demo
from kcache.demo.stages import PRIOR_BATCH_SIZE, Stage, stage_config, train

ATEN = torch.ops.aten
PRODUCTS = {
    ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default,
    ATEN.convolution.default, ATEN.convolution_backward.default,
}  # fmt: skip
WAYS = ("float32", "bfloat16")
PARTS = ("digit", "ink", "paper", "everything")


class SummedInFloat32(TorchDispatchMode):
    """Products of bfloat16 are taken in float32 and rounded."""

    products = 0
    """How many were."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or all(arg.dtype != torch.bfloat16 for arg in args if isinstance(arg, torch.Tensor)):
            return func(*args, **kwargs)
        self.products += 1
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, dict(kwargs)))
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, func(*args, **kwargs))


def measure(folder: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Both ways with a seed, in `folder`."""
    size = QUICK if quick else WHOLE
    run_demo(folder, size, say=print, seed=seed)
    result = json.loads((folder / "result.json").read_text())
    losses = {stage["stage"]: {"float32": stage["cached"]["losses"]} for stage in result["stages"]}
    runs, start = folder / "runs-bf16", time.perf_counter()
    stages: tuple[tuple[Stage, int, int], ...] = (
        ("prior", size.prior_steps, PRIOR_BATCH_SIZE),
        ("decoder", size.decoder_steps, size.decoder_batch_size),
    )
    for stage, steps, batch_size in stages:
        print(f"training the {stage} for {steps} steps with weights in bfloat16")
        config = stage_config(stage, runs / stage, steps, batch_size, seed)
        config = replace(config, weights="bf16", mixed_precision="bf16", optimizer="adamw-8bit")
        with SummedInFloat32() as mode:
            losses[stage]["bfloat16"] = train(folder / "cache", config).losses
        if not mode.products:
            raise SystemExit("no product of bfloat16 was taken: what was trained was something else")
    seconds = time.perf_counter() - start
    asked = questions()[: size.questions]
    exam = sit_exam(asked, folder / "samples-bf16", runs, size=size, seed=1_000_000 * seed)
    scores = {"float32": result["exam"]["score"], "bfloat16": {part: getattr(exam.score, part) for part in PARTS}}
    last = {
        stage: {way: round(sum(of_way[-50:]) / len(of_way[-50:]), 5) for way, of_way in ways.items()}
        for stage, ways in losses.items()
    }
    return {
        "pictures": len(asked) * size.samples,
        "scores": {way: {part: round(score[part], 2) for part in PARTS} for way, score in scores.items()},
        "mean_of_last_50_losses": last,
        "demo_seconds": round(result["total_seconds"], 1),
        "bfloat16_training_seconds": round(seconds, 1),
    }


def show(results: Mapping[str, Any]) -> None:
    """Print a table."""
    print(f"| seed | weights | {' | '.join(PARTS)} | last losses |\n|---|---|{'---:|' * (len(PARTS) + 1)}")
    for seed, found in results.items():
        for way in WAYS:
            losses = ", ".join(f"{stage} {ways[way]}" for stage, ways in found["mean_of_last_50_losses"].items())
            shares = " | ".join(f"{found['scores'][way][part]:.1f}" for part in PARTS)
            print(f"| {seed} | {way} | {shares} | {losses} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="as long as `kcache demo --quick`")
    parser.add_argument("--folder", type=Path, help="keep what was made here")
    parser.add_argument("--output", type=Path, help="file or folder for the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as `kcache demo` does: in networks this small, threads wait for each other
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        results = {f"seed {seed}": measure(folder / f"seed-{seed}", seed, arguments.quick) for seed in arguments.seeds}
    show(results)
    write_outcome(arguments.output, "demo_weights", vars(arguments), results, "quick" if arguments.quick else "")


if __name__ == "__main__":
    main()
