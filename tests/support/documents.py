"""Documents taken apart and run: their fenced commands and Python, on the tiny pair instead of the published one."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

ROOT = Path(__file__).parents[2]

SMALLER = {
    "768": "64",
    "--resolution 32": "--resolution 64",
    "height=64, width=64": "height=64, width=64, num_inference_steps=2, prior_num_inference_steps=2",
    "--mixed-precision fp16": "--mixed-precision no",
    "--val-fraction 0.02": "--val-fraction 0.4",
    "--num-class-rows 100": "--num-class-rows 4",
    "checkpoint-500": "checkpoint-2",
    "caption_cosine > 0.2": "caption_cosine > -1",
    "torch.float16": "torch.float32",
    "pipeline.enable_model_cpu_offload()": "",
    '"cuda"': '"cpu"',
    "10_000": "2",
    "$TMPDIR/photos": "caches/photos",
}
"""What stands in a document, and what is run instead, so that it is quick and needs no accelerator."""
PROGRAMS = ("kcache ", "accelerate launch ", "torchrun ")
_SHORT = shlex.split("--checkpointing-steps 1 --report-to none --no-push-to-hub --max-train-steps")
ADDED = {
    "cache-build": ["--resolution", "64"],
    "train-prior": [*_SHORT, "2"],
    "train-decoder": [*_SHORT, "2"],
    "sample": shlex.split("--num-inference-steps 2 --prior-num-inference-steps 2 --height 64 --width 64"),
    "sample --aspect-ratio": shlex.split("--num-inference-steps 2 --prior-num-inference-steps 2"),
}
"""What is added to each command for the same reasons: the last of a flag's values counts."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced part of a document."""

    place: str
    language: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    """All fenced parts of a document, in order."""
    text = document.read_text()
    return [
        Block(place=f"{document.name}:{text.count(chr(10), 0, fenced.start()) + 1}", language=fenced[1], text=fenced[2])
        for fenced in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block that call kcache or a launcher, each as its words."""
    if block.language not in ("", "bash"):
        return []
    lines = [
        re.sub(r"^([A-Z_]+=\S* )+|^srun (--\S+ )*| &$", "", line)
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(PROGRAMS)]


def arguments_of(words: list[str]) -> list[str] | None:
    """What `kcache` is given by a command, also by a launcher's; None where something else is launched."""
    if words[0] == "kcache":
        return words[1:]
    if words[0] == "torchrun":
        launched = torchrun_parser().parse_args(words[1:])
    else:
        launched = launch_command_parser().parse_args(words[2:])
    return launched.training_script_args if launched.module and launched.training_script == "kcache_cli" else None


def smaller(text: str) -> str:
    for said, run in SMALLER.items():
        text = text.replace(said, run)
    return text


def run_document(document: Path, command: Callable[..., int], *, together: bool = False) -> list[dict[str, Any]]:
    """Run all commands and Python of a document in order, and return the names that each block of Python leaves.

    `together` lets a block use the names of those before it.
    """
    left: list[dict[str, Any]] = []
    for block in blocks_of(document):
        for words in commands_of(block):
            arguments = arguments_of(shlex.split(smaller(shlex.join(words))))
            if arguments is not None:
                resumed = ["--max-train-steps", "3"] if "--resume-from-checkpoint" in arguments else []
                shaped = " --aspect-ratio" if "--aspect-ratio" in arguments else ""
                status = command(*arguments, *ADDED.get(arguments[0] + shaped, []), *resumed)
                assert status == 0, f"{block.place}: {shlex.join(words)}"
        if block.language == "python":
            names: dict[str, Any] = dict(left[-1]) if together and left else {}
            exec(compile(smaller(block.text), block.place, "exec"), names)  # noqa: S102
            left.append(names)
    return left
