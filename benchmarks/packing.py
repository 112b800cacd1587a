"""How fast the prior learns from packed captions, against its stock forward pass over padded ones in the same run.

    python benchmarks/packing.py --output packing.json
    python benchmarks/packing.py --config prior/config.json --layers 2 --batch-size 16

Forward and backward pass of one batch, without the optimizer, which costs the same either way. Caption lengths are
drawn from two distributions: caption-like, normal with mean 16 and deviation 4, and web-like, log-normal with mean 16.
The ways take turns. Without --config the prior is tiny, which times the overhead rather than the arithmetic; few
layers flatter packing, as most of the last one falls away. Prints a table and writes JSON with the hardware and the
versions.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from diffusers import PriorTransformer
from measuring.record import machine
from torch import Tensor

from kcache.objectives.packed_attention import PackedWay
from kcache.objectives.packing import allow_packing, predict_packed, predict_padded

TINY = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "embedding_dim": 128}


def draw_lengths(kind: str, count: int) -> np.ndarray:
    """Tokens per caption, begin and end included: 2 to 77."""
    rng = np.random.default_rng(0)
    spread = 0.8
    drawn = rng.normal(16, 4, count) if kind == "caption" else rng.lognormal(np.log(16) - spread**2 / 2, spread, count)
    return drawn.round().clip(2, 77).astype(np.int64)


def make_prior(config: Path | None, layers: int | None, device: str) -> PriorTransformer:
    settings = json.loads(config.read_text()) if config else dict(TINY)
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    torch.manual_seed(0)
    return PriorTransformer(**settings | ({"num_layers": layers} if layers else {})).to(device)


def make_batch(prior: PriorTransformer, lengths: np.ndarray, device: str) -> dict[str, Any]:
    """The arguments of `predict_packed`."""
    generator = torch.Generator().manual_seed(1)
    size, width = len(lengths), prior.config.embedding_dim
    batch = {
        "noisy": torch.randn(size, width, generator=generator),
        "timesteps": torch.randint(1000, (size,), generator=generator),
        "text_embeds": torch.randn(size, prior.config.embedding_proj_dim or width, generator=generator),
        "hidden_states": torch.randn(int(lengths.sum()), width, generator=generator),
        "offsets": torch.from_numpy(np.concatenate([[0], lengths.cumsum()])),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def seconds(prior: PriorTransformer, predict: Callable[[], Tensor], device: str, autocast: bool) -> float:
    """One forward and backward pass."""
    prior.zero_grad()
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
        prediction = predict()
    prediction.float().square().mean().backward()
    synchronize()
    return time.perf_counter() - start


def measure(ways: dict[str, Callable[[], Tensor]], rounds: int, time_one: Callable[..., float]) -> dict[str, Any]:
    """Medians over `rounds` rounds in which the ways take turns, and each way's speed-up on the first, by round."""
    for predict in ways.values():
        time_one(predict)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, predict in ways.items():
            samples[name].append(time_one(predict))
    baseline = samples[next(iter(ways))]
    return {
        name: {
            "milliseconds": round(statistics.median(runs) * 1e3, 2),
            "speed_up": round(statistics.median(base / run for run, base in zip(runs, baseline, strict=True)), 2),
        }
        for name, runs in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config.json of a prior (default: a tiny one)")
    parser.add_argument("--layers", type=int, help="blocks, if not as many as the configuration says")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16")
    parser.add_argument("--attention", nargs="+", choices=get_args(PackedWay), default=["grouped", "padded"])
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    prior = make_prior(arguments.config, arguments.layers, arguments.device)
    allow_packing(prior)

    def time_one(predict: Callable[[], Tensor]) -> float:
        return seconds(prior, predict, arguments.device, arguments.autocast)

    results: dict[str, Any] = {}
    for kind in ("caption", "web"):
        lengths = draw_lengths(kind, arguments.batch_size)
        batch = make_batch(prior, lengths, arguments.device)
        ways: dict[str, Callable[[], Tensor]] = {"stock": partial(predict_padded, prior, **batch)}
        for way in arguments.attention:
            ways[f"packed, {way}"] = partial(predict_packed, prior, **batch, attention=way)
        tokens = {
            "stock": (prior.config.num_embeddings + 4) * len(lengths),
            "packed": int(lengths.sum()) + 4 * len(lengths),
        }
        results[kind] = {"tokens": tokens, **measure(ways, arguments.rounds, time_one)}
    settings = vars(arguments) | {"config": str(arguments.config or "tiny"), "threads": torch.get_num_threads()}
    del settings["output"]
    report = {"benchmark": "packing", "machine": machine(), "settings": settings, "results": results}
    print(f"{'':28}{'ms':>12}{'speed-up':>10}")
    for kind, rows in results.items():
        tokens = rows.pop("tokens")
        print(f"{kind}: {tokens['stock']:,} tokens, packed {tokens['packed']:,}")
        for name, row in rows.items():
            print(f"  {name:26}{row['milliseconds']:>12,}{row['speed_up']:>10}")
        rows["tokens"] = tokens
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
