"""Flags of diffusers' Kandinsky 2.2 training scripts that are spelt otherwise here, or that a cache makes meaningless.

Every other flag of those scripts is a flag of `kcache train-prior` and `kcache train-decoder`, with its old meaning.
"""

import shlex
from collections.abc import Sequence

from kcache.config.train_checks import CLASS_PICTURES
from kcache.errors import ConfigError

TRAINING = ("train-prior", "train-decoder")

TRANSLATED = {
    "--rank": "--lora-rank",
    "--validation-prompt": "--validation-prompts",
    "--enable-xformers-memory-efficient-attention": "--attention=xformers",
}
"""What each flag is spelt here."""

_DATA = "the cache decides what is trained on, so give it when the cache is built: "

REFUSED = {
    "--dataset-name": _DATA + "kcache cache-build {value} CACHE",
    "--train-data-dir": _DATA + "kcache cache-build {value} CACHE",
    "--max-train-samples": _DATA + "kcache cache-build SOURCE CACHE --max-train-samples {value}",
    "--dataset-config-name": _DATA + "save that configuration to a folder, "
    'datasets.load_dataset(NAME, "{value}", split="train").save_to_disk("FOLDER"), '
    "then kcache cache-build FOLDER CACHE",
    "--dataloader-num-workers": "rows are read by two threads, which no worker process could outrun; leave it out; "
    "threads that decode images are a matter of building: kcache cache-build SOURCE CACHE --num-workers {value}",
    "--hub-token": "every process of this machine, and the shell's history, would see the token; leave it out, and "
    "set HF_TOKEN or run: hf auth login",
    "--local-rank": "every process learns its rank from its launcher; leave it out, and start them by: "
    "accelerate launch -m kcache_cli {command} CACHE --output-dir RUN",
}
"""Why a flag is not taken, and the line to type instead, with the value that it was given."""

_REFUSED_FOR_THE_PRIOR = {
    "--resolution": "the prior learns image embeddings, which have no resolution; leave it out; the side of cached "
    "pictures is the decoder's: kcache train-decoder CACHE --output-dir RUN --resolution {value}",
}
_REFUSED_FOR_THE_DECODER = {"--class-prompt": CLASS_PICTURES}


def translated(arguments: Sequence[str]) -> list[str]:
    """The command line in this program's own flags; raises ConfigError for a flag that it does not take.

    Flags are expected with dashes. Values, what follows `--`, and other commands than the trainers' are kept.
    """
    if not arguments or arguments[0] not in TRAINING:
        return list(arguments)
    command, own = arguments[0], [arguments[0]]
    for position, argument in enumerate(arguments[1:], start=1):
        if argument == "--":
            return own + list(arguments[position:])
        flag, equals, value = argument.partition("=")
        following = next((text for text in arguments[position + 1 : position + 2] if not text.startswith("--")), "")
        reason = refusal(command, flag, value if equals else following)
        if reason is not None:
            raise ConfigError(f"{flag} was given to {command}; {reason}")
        own.append(TRANSLATED.get(flag, flag) + equals + value)
    return own


def refusal(command: str, flag: str, value: str = "") -> str | None:
    """Why `command` does not take `flag`, and what to type instead; None for a flag that it may take."""
    of_stage = _REFUSED_FOR_THE_PRIOR if command == "train-prior" else _REFUSED_FOR_THE_DECODER
    reason = REFUSED.get(flag) or of_stage.get(flag)
    if reason is None:
        return None
    return reason.format(command=command, value=shlex.quote(value) if value else "VALUE")
