"""Class rows drawn by the prior that a run begins with, by diffusers' own pipeline, unless a file has them."""

import logging
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from kcache.config import COMPUTE_DTYPES, TrainConfig
from kcache.decoration import decoration
from kcache.disk.memo import DigestMemo, own_folder
from kcache.encoders.repositories import Repository
from kcache.encoders.tokenizers import tokenizer_digest
from kcache.encoders.weights import weights_digest
from kcache.errors import CacheMismatchError, ModelError
from kcache.machine import check_fits
from kcache.report.pictures import remember_prompts
from kcache.report.sampling import draw_embeds
from kcache.store.checkpoint import Checkpoint
from kcache.store.recipe import json_digest
from kcache.tally import counted
from kcache.training.accelerator import wait_for_all
from kcache.training.network.objective import load_network
from kcache.training.preservation.rows import TABLE, ClassRows, keep_rows, path_of, read_rows

logger = logging.getLogger(__name__)

STEPS, GUIDANCE_SCALE = 25, 1.0
"""Of the pipeline. Its default guidance of 4 draws other embeddings than those that the prior predicts; to learn from
these moves it to where guidance would take it once more. On the demo's networks far less is kept so."""
BATCH_ROWS = 16
"""Rows drawn at once. In a batch of another size they would be rounded otherwise."""
SAY_SECONDS = 10.0


def class_rows_of(
    config: TrainConfig, base: Repository, accelerator: Accelerator, checkpoint: Checkpoint | None = None
) -> ClassRows | None:
    """The class rows of a run that begins with the prior in `base`: found, or else drawn; None without class prompts.

    They are looked for beside the `checkpoint` that the run goes on from, in its own directory, and in $KCACHE_HOME,
    where what is drawn is put. The main process does so; all others get them from it. Raises ConfigError for more than
    there is memory for, CacheMismatchError where the checkpoint's run had others, unless it begins a new order, and
    ModelError for a prior that cannot draw.
    """
    if not config.class_prompt:
        return None
    _check_room(config, base)
    recipe, content = recipe_of(config, base, accelerator.device), b""
    _check_same(recipe, config, checkpoint)
    if accelerator.is_main_process:
        rows = _found(recipe, [Path(config.output_dir) if checkpoint is None else checkpoint.path.parent])
        if rows is None:
            rows = _drawn(recipe, config, base, accelerator.device)
            with decoration("class rows could not be kept for other runs"):
                keep_rows(rows, own_folder())
        if checkpoint is not None and checkpoint.state.get("class_rows") not in (None, rows.digest):
            logger.warning(
                "%s was made with class rows that are gone, and come out rounded otherwise: the run goes on, "
                "but not bit for bit",
                checkpoint.path,
            )
        content = rows.to_bytes()
    return read_rows(_from_main(content, accelerator), recipe)


def _check_room(config: TrainConfig, base: Repository) -> None:
    values, rows = base.read("prior").values, len(config.class_prompt) * config.num_class_rows
    width = values.get("clip_embed_dim") or values.get("embedding_dim")
    size = rows * 4 * (width if isinstance(width, int) else 1)
    check_fits(counted(rows, "class row"), size, "give fewer --num-class-rows")


def _check_same(recipe: Mapping[str, Any], config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Check that a run goes on with the class rows that it was begun with: a checkpoint has them among its tables."""
    tables = {} if checkpoint is None else checkpoint.state.get("tables")
    begun, asked = tables.get(TABLE) if isinstance(tables, dict) else None, json_digest(recipe)
    if checkpoint is None or config.new_order or begun in (None, asked):
        return
    raise CacheMismatchError(
        f"{checkpoint.path} was trained beside class rows {begun[:12]}…, which another prior, text encoder or kind of "
        f"device has drawn; found {asked[:12]}…; expected the same, as they are what is kept; give the prior that the "
        "run was begun from by --pretrained-prior-model-name-or-path, or go on with rows of this one by --new-order"
    )


def recipe_of(config: TrainConfig, base: Repository, device: torch.device) -> dict[str, Any]:
    """All that decides the class rows of a run, as plain JSON; weights by their content."""
    with DigestMemo() as memo:
        weights = {name: weights_digest(base, name, memo, say=logger.warning) for name in ("prior", "text_encoder")}
    configured = {name: base.read(name).digest for name in ("prior", "text_encoder", "scheduler")}
    return {
        "weights": weights,
        "configurations": configured,
        "tokenizer": tokenizer_digest(base),
        "prompts": [prompt.strip() for prompt in config.class_prompt],
        "rows_of_each": config.num_class_rows,
        "seed": config.seed,
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "batch_rows": BATCH_ROWS,
        "dtypes": [str(_frozen_dtype(device)).removeprefix("torch."), COMPUTE_DTYPES[config.mixed_precision]],
    }


def _frozen_dtype(device: torch.device) -> torch.dtype:
    """As in `kcache sample`."""
    return torch.float16 if device.type == "cuda" else torch.float32


def _found(recipe: Mapping[str, Any], folders: Sequence[Path]) -> ClassRows | None:
    places = list(folders)
    with decoration("class rows of earlier runs cannot be looked for"):
        places.append(own_folder())
    for path in (path_of(folder, recipe) for folder in places):
        if not path.is_file():
            continue
        try:
            rows = read_rows(path.read_bytes(), recipe)
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be taken: %s", path, error)
            continue
        logger.warning("%s: taken from %s, nothing is drawn", _told(recipe), path)
        return rows
    return None


def _told(recipe: Mapping[str, Any]) -> str:
    prompts = [repr(textwrap.shorten(prompt, 60, placeholder="…")) for prompt in recipe["prompts"]]
    more = f" and {len(prompts) - 3} more" if len(prompts) > 3 else ""
    return f"{counted(len(prompts) * recipe['rows_of_each'], 'class row')} of {', '.join(prompts[:3])}{more}"


def _drawn(recipe: Mapping[str, Any], config: TrainConfig, base: Repository, device: torch.device) -> ClassRows:
    """Drawn by the prior in `base`: first its text encoder is asked, then let go, so that one is there at a time."""
    prompts, count = recipe["prompts"], recipe["rows_of_each"]
    logger.warning("%s: drawn by the prior of %s, before it is trained", _told(recipe), base.name)
    purpose = ", which is to draw class rows"
    pipeline = remember_prompts(base, prompts, _frozen_dtype(device), device, purpose=purpose)
    pipeline.prior = load_network(config.stage, base.path).to(device).eval()
    asked = [prompt for prompt in prompts for _ in range(count)]
    generators = [torch.Generator().manual_seed(config.seed + i) for i in range(len(asked))]
    dtype = getattr(torch, COMPUTE_DTYPES[config.mixed_precision])
    embeds: list[torch.Tensor] = []
    begun = said = time.monotonic()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for start in range(0, len(asked), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            drawn = draw_embeds(
                pipeline,
                asked[part],
                generators[part],
                batch_size=BATCH_ROWS,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
            )
            embeds += [row for row, _ in drawn]
            now = time.monotonic()
            if now - said >= SAY_SECONDS and len(embeds) < len(asked):
                rate, said = len(embeds) / (now - begun), now
                left = (len(asked) - len(embeds)) / rate
                logger.warning("class rows: %d of %d, %.3g/s, %.0f s left", len(embeds), len(asked), rate, left)
    logger.warning("class rows: %d drawn in %.1f s", len(asked), time.monotonic() - begun)
    arrays = {"image_embeds": torch.cat(embeds).float().numpy(), **_texts(pipeline.prompt_states, prompts)}
    _check_finite(arrays, base)
    return ClassRows(recipe=recipe, arrays=arrays)


def _texts(states: Mapping[str, tuple[torch.Tensor, ...]], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The texts of the prompts, and that of the empty caption, which stands before each, behind them."""
    texts = [(*(state[1] for state in states[prompt]),) for prompt in prompts]
    texts.append((*(state[0] for state in states[prompts[0]]),))
    tokens = [hidden[mask] for _, hidden, mask in texts]
    return {
        "text_embeds": torch.stack([embed for embed, _, _ in texts]).float().numpy(),
        "text_encoder_hidden_states": torch.cat(tokens).float().numpy(),
        "text_offsets": np.concatenate([[0], np.cumsum([len(text) for text in tokens])]),
    }


def _check_finite(arrays: Mapping[str, np.ndarray], base: Repository) -> None:
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise ModelError(
            f"the prior of {base.name} draws class rows that are not finite ({', '.join(broken)}); expected numbers; "
            "try another --mixed-precision, or leave --class-prompt out"
        )


def _from_main(content: bytes, accelerator: Accelerator) -> bytes:
    """What the main process has, in all of them; the others wait as long as it takes."""
    if accelerator.num_processes == 1:
        return content
    wait_for_all()
    size = broadcast(torch.tensor([len(content)], device=accelerator.device))
    block = torch.zeros(int(size), dtype=torch.uint8)
    if accelerator.is_main_process:
        block = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return bytes(broadcast(block.to(accelerator.device)).cpu().numpy().tobytes())
