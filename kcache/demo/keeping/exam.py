"""A new style of a digit with a word of its own, and prompts of old and new, judged by the demo's scoring."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kcache.demo.digits import DIGITS, FULL, INKS, PAPERS, Drawing, all_drawings, coloured, is_held_out, read_scans
from kcache.demo.exam import draw
from kcache.demo.result import Score
from kcache.demo.scoring import read, score

STYLE = Drawing(digit=7, ink="purple", paper="pink")
"""What the new word stands for. No prior has seen a seven in this ink before."""
WORD = "a sks seven"
"""All that its pictures are captioned with: the first word is none that the demo's captions have."""
OLD, SEVENS, NEW = "all digits", "sevens", "the new style"
ONE, ALL = ("the digit seven",), tuple(f"the digit {name}" for name in DIGITS)
"""Class prompts: of the digit that is learnt, and of all of them. Neither says an ink or a paper."""

Question = tuple[str, Drawing]
"""A prompt, and what a picture of it shows."""


def write_style(folder: Path, count: int) -> None:
    """Write `count` pictures of the style as an imagefolder, each of another scan, all with the same caption."""
    scans, digits = read_scans(test=False)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scan in enumerate(scans[digits == STYLE.digit][:count]):
        name = f"{number:02}.png"
        coloured(scan, STYLE.ink, STYLE.paper).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": WORD}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def questions(samples: int) -> dict[str, list[Question]]:
    """What is asked for, `samples` pictures of each: every pair of digit and ink that was trained on, on changing
    papers; sevens in all these inks on all papers; the new style, ten times as often.

    Prompts of old drawings say all of them; none is a class prompt.
    """
    inks, papers = list(INKS), list(PAPERS)
    seen = [drawing for drawing in all_drawings() if not is_held_out(drawing)]
    pairs = [one for one in seen if one.paper == papers[(one.digit + inks.index(one.ink)) % len(papers)]]
    sevens = [one for one in seen if one.digit == STYLE.digit]
    asked = {name: [(one.caption(FULL[i % len(FULL)]), one) for i, one in enumerate(of_name)]
             for name, of_name in ((OLD, pairs), (SEVENS, sevens))}  # fmt: skip
    asked[NEW] = [(WORD, STYLE)] * 10
    return {name: [question for question in of_name for _ in range(samples)] for name, of_name in asked.items()}


def ask(
    asked: dict[str, list[Question]], prior: Path, decoder: Path, *, steps: int, seed: int
) -> dict[str, list[Image.Image]]:
    """What a prior and the decoder draw of all questions, from the same noise whichever prior it is."""
    prompts = [prompt for of_name in asked.values() for prompt, _ in of_name]
    drawn = iter(draw(prompts, prior, decoder, steps=steps, seed=seed))
    return {name: [next(drawn) for _ in of_name] for name, of_name in asked.items()}


def judge(drawn: dict[str, list[Image.Image]], asked: dict[str, list[Question]]) -> dict[str, Score]:
    """How many pictures show what was asked for, in per cent."""
    seen = iter(read([picture for pictures in drawn.values() for picture in pictures]))
    return {name: score([next(seen) for _ in of_name], [wanted for _, wanted in of_name])
            for name, of_name in asked.items()}  # fmt: skip


def shown(asked: Sequence[Question], columns: int) -> list[int]:
    """Questions to show, evenly from all of them."""
    return np.linspace(0, len(asked) - 1, columns).astype(int).tolist()
