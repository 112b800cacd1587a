"""What a tokenizer does: to captions, and by its files, with a digest that is the same in whatever files it stands."""

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kcache.encoders.repositories import FINISH, Configuration, Repository
from kcache.errors import ModelError
from kcache.foreign import reason
from kcache.plainly import plainly_at
from kcache.store.recipe import json_digest

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_FILES = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "vocab.json")
_ROLES = {
    "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}  # fmt: skip
"""CLIP's special tokens, where nothing else is said."""
_USUAL: dict[str, Any] = {
    "add_prefix_space": False, "added_tokens_decoder": None, "clean_up_tokenization_spaces": None,
    "do_lower_case": True, "errors": "replace", "extra_special_tokens": None, "processor_class": None,
}  # fmt: skip
"""What CLIP's tokenizer does where its configuration says nothing; what is None here changes no token."""
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_STEPS: dict[str, Any] = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ],
    },
    "model": {
        "type": "BPE", "dropout": None, "unk_token": "<|endoftext|>", "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    },
}  # fmt: skip
"""How CLIP's tokenizer works, in tokenizer.json's words, which no list of words and merges says."""

_TRIALS = "", "Two  RED balls,\n naïve 猫 👩‍🚀!", "<|endoftext|> it's 1234", "a word " * 99
"""Captions on trial: none, of all kinds of characters, with special tokens, and longer than any text encoder takes."""


class CaptionTokenizer:
    """A caption → token ids, padded or cut to a length, and how many of them are valid; for several threads.

    The Rust tokenizer behind transformers' does it in half of the time; but only where both agree on captions on trial.
    """

    def __init__(self, tokenizer: "CLIPTokenizer", length: int) -> None:
        self._tokenizer = tokenizer
        self._length = length
        # transformers sets padding and truncation on the one Rust tokenizer, which threads may not share meanwhile.
        self._lock = threading.Lock()
        agree = all(self._as_transformers(caption) == self._as_rust(caption) for caption in _TRIALS)
        self.tokens = self._as_rust if agree else self._as_transformers

    def _as_rust(self, caption: str) -> tuple[list[int], int]:
        tokens = self._tokenizer.backend_tokenizer.encode(caption)  # padded and cut as it was last told
        return tokens.ids, sum(tokens.attention_mask)

    def _as_transformers(self, caption: str) -> tuple[list[int], int]:
        with self._lock:
            tokens = self._tokenizer(caption, max_length=self._length, padding="max_length", truncation=True)
        return tokens["input_ids"], sum(tokens["attention_mask"])


def tokenizer_digest(repository: Repository, *, known: str | None = None) -> str:
    """sha256 (hex) of what a tokenizer does: its words, merges and special tokens, and whatever is not CLIP's usual.

    It is the same for tokenizer.json and for vocab.json with merges.txt, in whatever order and layout. Where the digest
    of the files, which was recorded earlier, is `known`, that stays. Raises ModelError when there is no vocabulary, and
    for files that cannot be read.
    """
    folder = repository.path / "tokenizer"
    present = [name for name in _FILES if (folder / name).is_file()]
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= set(present):
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) if folder.is_dir() else "no such folder"
        do = FINISH if repository.unfinished else "fetch or export the tokenizer again"
        raise ModelError(
            f"{folder} has no vocabulary (found {found or 'an empty folder'}); "
            f"expected tokenizer.json, or vocab.json and merges.txt; {do}"
        )
    configuration = repository.read("tokenizer")
    files = {name: (folder / name).read_bytes() for name in present}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    of_files = json_digest({"files": digests, "config": configuration.lasting})
    if of_files == known:
        return of_files
    try:
        return json_digest(_tokenizer(files, configuration))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        odd = next((f": {name} is {what}" for name in present if (what := plainly_at(folder / name))), "")
        raise ModelError(
            f"{folder} cannot be read as a tokenizer ({reason(error)}){odd}; fetch or export it again"
        ) from error


def _tokenizer(files: Mapping[str, bytes], configuration: Configuration) -> dict[str, Any]:
    """What the tokenizer of these files does, as JSON; where two of them disagree, what both say."""
    read = {name: json.loads(content) for name, content in files.items() if name.endswith(".json")}
    whole = read.get("tokenizer.json", {"model": {}})
    model, settings = whole["model"], {**configuration.lasting}
    words = [vocabulary for vocabulary in (model.get("vocab"), read.get("vocab.json")) if vocabulary is not None]
    merges: list[list[list[str]]] = []
    if "merges" in model:
        merges.append([pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]])
    if "merges.txt" in files:
        lines = files["merges.txt"].decode().split("\n")
        merges.append([line.split() for line in lines if line.strip() and not line.startswith("#version")])
    special = {role: _special(role, settings, read.get("special_tokens_map.json", {})) for role in _ROLES}
    ids = [*whole.get("added_tokens", ()), *_added(settings, read.get("added_tokens.json", {}))]
    reserved = {token for tokens in special.values() for token in tokens}
    unusual = {name: value for name, value in settings.items() if name not in _USUAL and name not in _ROLES}
    for name, usual in _USUAL.items():
        if usual is not None and settings.get(name, usual) != usual:
            unusual[name] = settings[name]
    return {
        "words": _distinct(words),
        "merges": _distinct(merges),
        "special": special,
        "added": _distinct([token for token in map(_token, ids) if not _is_usual(token, reserved, words[0])]),
        "settings": unusual,
        "steps": _unusual_steps(whole) if "tokenizer.json" in read else {},
    }


def _distinct(values: Iterable[Any]) -> list[str]:
    return sorted({json_digest(value) for value in values})


def _special(role: str, *said: Mapping[str, Any]) -> list[str]:
    """The token of a `role`, by all who say one."""
    given = [token.get("content") if isinstance(token := each[role], dict) else token for each in said if role in each]
    return sorted({str(token) for token in given if token is not None}) or [_ROLES[role]]


def _added(settings: Mapping[str, Any], added: Mapping[str, int]) -> list[dict[str, Any]]:
    """The added tokens of the configuration and of added_tokens.json, as tokenizer.json has them."""
    decoder = settings.get("added_tokens_decoder") or {}
    return [{"id": int(number), **token} for number, token in decoder.items()] + [
        {"id": number, "content": content} for content, number in added.items()
    ]


def _token(said: Mapping[str, Any]) -> dict[str, Any]:
    flags = {name: True for name in ("single_word", "lstrip", "rstrip") if said.get(name)}
    return {"id": said["id"], "content": said["content"], **flags}


def _is_usual(token: Mapping[str, Any], reserved: Iterable[str], words: Mapping[str, int]) -> bool:
    content = token["content"]
    return content in reserved and token == {"id": words.get(content), "content": content}


def _unusual_steps(whole: Mapping[str, Any]) -> dict[str, Any]:
    steps = {name: _step(whole, name) for name in _STEPS}
    return {name: step for name, step in steps.items() if step != _STEPS[name]}


def _step(whole: Mapping[str, Any], name: str) -> Any:
    """A step of tokenizer.json without what no token depends on, and with what older ones leave out."""
    said = whole.get(name)
    if name == "model":
        kept = {key: value for key, value in (said or {}).items() if key not in ("vocab", "merges")}
        return _STEPS["model"] | {key: value for key, value in kept.items() if value is not None}
    return _plain(said)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        kept = {key: _plain(item) for key, item in value.items() if key != "trim_offsets"}
        return kept | {"use_regex": kept.get("use_regex", True)} if kept.get("type") == "ByteLevel" else kept
    return value
