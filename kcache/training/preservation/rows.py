"""Class rows: image embeddings with the texts that they were drawn from, their file, and which go beside which samples.

A file is one of safetensors: image_embeds (P N, D) float32, N of each of P prompts behind each other; text_embeds
(P + 1, D) float32 and text_encoder_hidden_states (T, C) float32 of these prompts and of the empty caption, whose tokens
lie at text_offsets (P + 2,) int64. Its metadata says what decided them, and has a checksum.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from kcache.disk.durable import write_bytes, writing
from kcache.loader.chance import draw_dropout, epoch_order
from kcache.loader.turns import draw_turns
from kcache.objectives.preservation import CLASS
from kcache.store.recipe import canonical_json, json_digest

FIRST_TURN = 1 << 62
"""Class rows have turns of their own, by so much higher than those of the samples beside them: no two draw alike."""
BUCKET = (1 << 32) - 1
"""The bucket that they are shuffled as; those of samples count from 0."""
TABLE = "class_rows"
"""What a run calls them among its tables, the folder of a run directory and of $KCACHE_HOME that holds their files, and
the metadata of a file."""
_FIELDS = ("image_embeds", "text_embeds", "text_encoder_hidden_states", "text_offsets")


@dataclass(frozen=True, kw_only=True)
class ClassRows:
    """Drawn by a prior, of its class prompts."""

    recipe: Mapping[str, Any]
    """All that decides them, as plain JSON."""
    arrays: Mapping[str, np.ndarray]
    """As in a file."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the recipe: of rows with the same one there need be only one file."""
        return json_digest(self.recipe)

    @property
    def digest(self) -> str:
        """sha256 (hex) of what they are."""
        whole = hashlib.sha256()
        for name in _FIELDS:
            array = np.ascontiguousarray(self.arrays[name])
            whole.update(canonical_json([name, str(array.dtype), list(array.shape)]).encode())
            whole.update(array.tobytes())
        return whole.hexdigest()

    def to_bytes(self) -> bytes:
        """What a file has."""
        about = canonical_json({"recipe": self.recipe, "sha256": self.digest})
        return save({name: self.arrays[name] for name in _FIELDS}, {TABLE: about})

    def beside(
        self, turns: np.ndarray, *, seed: int, timesteps: int, draws: int = 1, dropout: float = 0.0
    ) -> dict[str, np.ndarray]:
        """What joins the batch of the samples at `turns` (B,) int64: a class row for each, with all that it meets.

        By the names that `PriorObjective.predict` has, with `CLASS` in front: its embedding and text, that of the empty
        caption for a share `dropout` of them, `draws` times noise and one of so many `timesteps`. Every class row comes
        once before any comes again, in an order of its own each time.
        """
        embeds, offsets = self.arrays["image_embeds"], self.arrays["text_offsets"]
        prompts, own = len(offsets) - 2, turns + FIRST_TURN
        rows = rows_of(seed, turns, len(embeds))
        texts = np.where(draw_dropout(seed, own, "caption", dropout), prompts, rows // (len(embeds) // prompts))
        states = [self.arrays["text_encoder_hidden_states"][offsets[text] : offsets[text + 1]] for text in texts]
        joining = {
            "image_embeds": embeds[rows],
            "text_embeds": self.arrays["text_embeds"][texts],
            "text_encoder_hidden_states": np.concatenate(states),
            "text_offsets": np.concatenate([[0], np.cumsum([len(state) for state in states])]),
            **draw_turns(seed, own, embeds.shape[1:], timesteps, draws),
        }
        return {CLASS + name: array for name, array in joining.items()}


def rows_of(seed: int, turns: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` class rows goes beside the sample at each of `turns` (B,) int64 → (B,) int64."""
    passes, places = np.divmod(turns, count)
    orders = {number: epoch_order(seed, number, count, "full", BUCKET) for number in np.unique(passes).tolist()}
    return np.array([orders[number][place] for number, place in zip(passes.tolist(), places, strict=True)], np.int64)


def read_rows(content: bytes, recipe: Mapping[str, Any]) -> ClassRows:
    """The class rows in the bytes of a file; raises ValueError where these are not whole, or of another recipe."""
    try:
        length = int.from_bytes(content[:8], "little")
        about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][TABLE])
        rows = ClassRows(recipe=about["recipe"], arrays=load(content))
        found, expected = rows.digest, about["sha256"]
    except Exception as error:  # whatever the bytes are: safetensors has an exception of its own
        raise ValueError(f"it is no file of class rows: {error!r}") from error
    if found != expected:
        raise ValueError("its checksum is another")
    if rows.fingerprint != json_digest(recipe):
        raise ValueError("its class rows are others")
    return rows


def path_of(folder: Path, recipe: Mapping[str, Any]) -> Path:
    """Where `folder`, a run directory or $KCACHE_HOME, has the class rows of a recipe."""
    return folder / TABLE / f"{json_digest(recipe)[:32]}.safetensors"


def keep_rows(rows: ClassRows, folder: Path) -> None:
    """Write class rows to their `path_of` in `folder`, if they are not there; raises CacheWriteError."""
    path, content = path_of(folder, rows.recipe), rows.to_bytes()
    with writing(path):
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
