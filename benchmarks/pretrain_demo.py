"""Train the frozen encoders of the demo: CLIP's text and image towers, and the MoVQ.

    python benchmarks/pretrain_demo.py --output kcache/demo/models
    python benchmarks/pretrain_demo.py --strict-control --output /tmp/control

The weights in kcache/demo/models were made in three runs, since 800 steps were too few for the towers:

    python benchmarks/pretrain_demo.py --only towers --output /tmp/towers
    python benchmarks/pretrain_demo.py --only towers --towers-from /tmp/towers --towers-steps 600 --seed 1 \\
        --output kcache/demo/models
    OMP_NUM_THREADS=1 python benchmarks/pretrain_demo.py --only movq --output kcache/demo/models

Both learn from the demo's own pictures, without the scans that are kept for tests. All 240 drawings are shown, the
held-out ones too, as the published encoders have seen nearly everything; what the demo trains never sees those. With
--strict-control the encoders do not see them either. The towers learn as CLIP did (Radford et al. 2021, arXiv
2103.00020), where a caption that leaves something out matches every picture it is true of. The MoVQ (Zheng et al. 2022,
arXiv 2209.09002) learns to give back pictures, quantised in half of each batch, since Kandinsky's decoder draws latents
that are not quantised. Writes float16 weights and training.json: seeds, steps, threads, the losses on the way, and what
the encoders can do with the test scans. Same seed, machine and number of threads: same weights.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import VQModel
from measuring.record import machine
from safetensors.torch import load_file, save_file
from torch import Tensor

from kcache.demo.digits import INKS, PAPERS, SIDE, TEMPLATES, Drawing, all_drawings, cover_of, is_held_out, read_scans
from kcache.demo.tiny import image_encoder, image_processor, movq, text_encoder, tokenizer
from kcache.disk.durable import share

ATTRIBUTES = ("digit", "ink", "paper")
MEAN, STD = (torch.tensor(getattr(image_processor(), name)).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))


class Pictures:
    """Pictures of the scans of one half, drawn on demand."""

    def __init__(self, test: bool) -> None:
        scans, digits = read_scans(test=test)
        self.covers = torch.from_numpy(np.stack([cover_of(scan) for scan in scans]))
        self.of_digit = [np.flatnonzero(digits == digit) for digit in range(10)]

    def draw(self, drawings: list[Drawing], rng: np.random.Generator, shift: int) -> Tensor:
        """A scan of each drawing, moved by up to `shift` pixels each way: (n, 3, SIDE, SIDE) float32 from 0 to 1."""
        chosen = [rng.choice(self.of_digit[drawing.digit]) for drawing in drawings]
        padded = F.pad(self.covers[chosen], (shift,) * 4)
        moves = rng.integers(0, 2 * shift + 1, (len(drawings), 2))
        covers = torch.stack(
            [cover[y : y + SIDE, x : x + SIDE] for cover, (y, x) in zip(padded, moves, strict=True)]
        ).unsqueeze(1)
        inks = torch.tensor([INKS[drawing.ink] for drawing in drawings]).view(-1, 3, 1, 1)
        papers = torch.tensor([PAPERS[drawing.paper] for drawing in drawings]).view(-1, 3, 1, 1)
        return (covers * inks + (1 - covers) * papers).round() / 255


class Towers(torch.nn.Module):
    """Both of CLIP's towers and the scale of their similarities."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tokenizer()
        self.text, self.image = text_encoder(self.tokenizer), image_encoder()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())

    def embed_captions(self, captions: list[str]) -> Tensor:
        ids = self.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        return F.normalize(self.text(ids).text_embeds, dim=-1)

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        return F.normalize(self.image((pictures - MEAN) / STD).image_embeds, dim=-1)


def train_towers(
    drawings: list[Drawing], steps: int, seed: int, start: Path | None
) -> tuple[Towers, list[dict[str, float]]]:
    """One step shows each of `drawings` once, half with a caption that says all; `start` has weights to begin with."""
    torch.manual_seed(seed)
    rng, pictures, towers, log = np.random.default_rng(seed), Pictures(test=False), Towers(), []
    if start is not None:
        towers.text.load_state_dict(load_file(start / "text_encoder.safetensors"))
        towers.image.load_state_dict(load_file(start / "image_encoder.safetensors"))
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        captions, truth = caption_all(drawings, rng)
        similarity = towers.embed_captions(captions) @ towers.embed_pictures(pictures.draw(drawings, rng, 2)).T
        logits = similarity * towers.scale.clamp(max=np.log(100)).exp()
        loss = (
            F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, truth.T / truth.T.sum(1, keepdim=True))
        ) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log.append({"step": step, "loss": round(loss.item(), 4)})
            print(f"towers {log[-1]}", flush=True)
    return towers.eval(), log


def caption_all(drawings: list[Drawing], rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """A caption per drawing, and which of the n drawings (columns) each caption (row) is true of: (n, n) float32."""
    full = len(TEMPLATES) // 2
    which = [int(rng.integers(full if rng.random() < 0.5 else len(TEMPLATES))) for _ in drawings]
    captions = [drawing.caption(TEMPLATES[i]) for drawing, i in zip(drawings, which, strict=True)]
    values = {name: np.array([getattr(drawing, name) for drawing in drawings]) for name in ATTRIBUTES}
    true = np.ones((len(drawings), len(drawings)), bool)
    for name in ATTRIBUTES:
        # "{an_ink}" and "{ink}" both say the ink.
        says = np.array([f"{name}}}" in TEMPLATES[i] for i in which])
        true &= ~says[:, None] | (values[name][:, None] == values[name][None, :])
    return captions, torch.from_numpy(true.astype(np.float32))


@torch.no_grad()
def examine_towers(towers: Towers) -> dict[str, dict[str, float]]:
    """Of test scans in all 240 drawings, 5 times: how often the nearest of the 240 plain captions is right, in %."""
    rng, pictures, drawings = np.random.default_rng(0), Pictures(test=True), all_drawings()
    captions = towers.embed_captions([drawing.caption() for drawing in drawings])
    pairs = []
    for _ in range(5):
        nearest = (towers.embed_pictures(pictures.draw(drawings, rng, 0)) @ captions.T).argmax(1).tolist()
        pairs += [(drawing, drawings[i]) for drawing, i in zip(drawings, nearest, strict=True)]
    held_out = [(drawing, found) for drawing, found in pairs if is_held_out(drawing)]
    return {name: shares_right(some) for name, some in (("all", pairs), ("held out", held_out))}


def shares_right(pairs: list[tuple[Drawing, Drawing]]) -> dict[str, float]:
    """How often each attribute, and all, are equal in both of a pair, in %."""
    right = {name: [getattr(one, name) == getattr(other, name) for one, other in pairs] for name in ATTRIBUTES}
    right["all"] = [one == other for one, other in pairs]
    return {name: round(100 * float(np.mean(hits)), 2) for name, hits in right.items()}


@torch.no_grad()
def image_statistics(towers: Towers, drawings: list[Drawing]) -> dict[str, Tensor]:
    """Mean and spread of the image embeddings of 20 pictures per drawing, which a prior divides by: (1, D) each."""
    rng, pictures = np.random.default_rng(0), Pictures(test=False)
    embeds = torch.cat([towers.image((pictures.draw(drawings, rng, 0) - MEAN) / STD).image_embeds for _ in range(20)])
    return {"clip_mean": embeds.mean(0, keepdim=True), "clip_std": embeds.std(0, keepdim=True)}


def train_movq(drawings: list[Drawing], steps: int, seed: int) -> tuple[VQModel, list[dict[str, float]]]:
    """Without the codebook for the first 40 % of the steps, as a codebook begun at random collapses."""
    torch.manual_seed(seed)
    rng, pictures, network, log = np.random.default_rng(seed), Pictures(test=False), movq(), []
    for name, parameter in network.named_parameters():
        # The spatial norms begin near the plain norm, with a scale of about one. Their shift begins large: the norms
        # have one channel per group here, which erases a picture's colours, and the shift brings them back.
        if "conv_y.bias" in name:
            parameter.data.fill_(1.0)
        elif "conv_y" in name:
            parameter.data.mul_(0.1)
        elif "conv_b" in name:
            parameter.data.mul_(2.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    codes_from = int(0.4 * steps)
    for step in range(1, steps + 1):
        shown = pictures.draw([drawings[i] for i in rng.integers(len(drawings), size=32)], rng, 2) * 2 - 1
        if step == codes_from:
            start_codebook(network, pictures, drawings, rng)
        loss, error = movq_loss(network, shown, quantise=step >= codes_from)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log.append({"step": step, "loss": round(loss.item(), 5), "mse": round(error.item(), 6)})
            print(f"movq {log[-1]}", flush=True)
    return network.eval(), log


def movq_loss(network: VQModel, shown: Tensor, *, quantise: bool) -> tuple[Tensor, Tensor]:
    """The loss, and the mean squared error of what came back."""
    latents = network.encode(shown).latents
    # Latents stay within about one, where the samplers of Kandinsky's decoder keep them.
    beyond = F.relu(latents.abs() - 0.95).square().mean()
    given, commitment = latents + 0.03 * torch.randn_like(latents), torch.zeros(())
    if quantise:
        half = len(shown) // 2
        codes, commitment, _ = network.quantize(latents[:half])
        given = torch.cat([codes, given[half:]])
    back = network.decode(given, force_not_quantize=True).sample
    error = F.mse_loss(back, shown)
    return error + 0.2 * F.l1_loss(back, shown) + beyond + 0.25 * commitment, error


@torch.no_grad()
def start_codebook(network: VQModel, pictures: Pictures, drawings: list[Drawing], rng: np.random.Generator) -> None:
    """Put the codes where latents are: k-means (Lloyd 1982) of those of one picture per drawing."""
    latents = network.encode(pictures.draw(drawings, rng, 2) * 2 - 1).latents.permute(0, 2, 3, 1).reshape(-1, 4)
    codes = latents[torch.randperm(len(latents))[: network.quantize.n_e]]
    for _ in range(10):
        nearest = torch.cdist(latents, codes).argmin(1)
        sums = torch.zeros_like(codes).index_add_(0, nearest, latents)
        counts = torch.bincount(nearest, minlength=len(codes)).unsqueeze(1)
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    network.quantize.embedding.weight.copy_(codes)


@torch.no_grad()
def examine_movq(network: VQModel) -> dict[str, float]:
    """How well test scans come back: PSNR in dB, from raw and from quantised latents, and where the latents are."""
    shown = Pictures(test=True).draw(all_drawings(), np.random.default_rng(0), 0) * 2 - 1
    latents = network.encode(shown).latents
    found = {"latents_std": latents.std().item(), "latents_max": latents.abs().max().item()}
    for name, raw in (("psnr", True), ("psnr_quantised", False)):
        back = network.decode(latents, force_not_quantize=raw).sample.clamp(-1, 1)
        found[name] = (10 * torch.log10(4 / F.mse_loss(back, shown))).item()
    return {name: round(value, 3) for name, value in found.items()}


def save(network: torch.nn.Module, path: Path) -> None:
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, path)
    share(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights and training.json")
    parser.add_argument("--only", choices=("towers", "movq"), help="train only these; the others stay as they are")
    parser.add_argument("--towers-steps", type=int, default=800)
    parser.add_argument("--movq-steps", type=int, default=1200)
    parser.add_argument("--towers-from", type=Path, help="folder of an earlier run, whose towers go on learning")
    parser.add_argument("--strict-control", action="store_true", help="leave the held-out drawings out here, too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "training.json"
    drawings = [drawing for drawing in all_drawings() if not (args.strict_control and is_held_out(drawing))]

    learned: dict[str, dict[str, Any]] = {}
    if args.only != "movq":
        learned["towers"] = make_towers(drawings, args.output, args.towers_steps, args.seed, args.towers_from)
    if args.only != "towers":
        learned["movq"] = make_movq(drawings, args.output, args.movq_steps, args.seed)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | learned, indent=1) + "\n")


def make_towers(drawings: list[Drawing], output: Path, steps: int, seed: int, start: Path | None) -> dict[str, Any]:
    """Train and write the towers, and what a prior divides by; returns what training.json says of them."""
    begun = time.perf_counter()
    towers, log = train_towers(drawings, steps, seed, start)
    save(towers.text, output / "text_encoder.safetensors")
    save(towers.image, output / "image_encoder.safetensors")
    save_file(image_statistics(towers, drawings), output / "prior_statistics.safetensors")
    share(output)
    entry = {
        "run": run_facts(drawings, steps, seed, begun),
        "nearest_caption_right_percent": examine_towers(towers),
        "log": log,
    }
    if start is not None:
        entry["before"] = json.loads((start / "training.json").read_text())["towers"]
    return entry


def make_movq(drawings: list[Drawing], output: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train and write the MoVQ; returns what training.json says of it."""
    begun = time.perf_counter()
    network, log = train_movq(drawings, steps, seed)
    save(network, output / "movq.safetensors")
    return {"run": run_facts(drawings, steps, seed, begun), "test": examine_movq(network), "log": log}


def run_facts(drawings: list[Drawing], steps: int, seed: int, begun: float) -> dict[str, Any]:
    """How a training went that began at `begun`."""
    return {
        "seed": seed,
        "steps": steps,
        "drawings": len(drawings),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - begun),
        "load": round(os.getloadavg()[0], 1),
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
