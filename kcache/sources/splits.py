"""Which files of a dataset belong to which of its splits: told by its card, or by their names, as `datasets` tells it.

The rules are those of `datasets.data_files`: names such as data/train-00000-of-00002.parquet, then folders, then files
that are called after a split. A dataset then has the same rows by its id on the Hub and as a copy on a disk.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kcache.errors import SourceError
from kcache.sources.reading import readable

Rule = Callable[[str], Collection[str]]
"""Says to which splits a path belongs, which is relative to the dataset, with slashes."""

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARDED = re.compile(r"data/([^/]*)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*", re.DOTALL)
_BETWEEN = r"[-._ 0-9]"
_FOLDERS = {
    split: re.compile(rf"(?:.*{_BETWEEN})?(?:{'|'.join(words)})(?:{_BETWEEN}.*)?", re.DOTALL)
    for split, words in _WORDS.items()
}
_FILES = {
    split: re.compile(rf"(?:.*{_BETWEEN})?(?:{'|'.join(words)}){_BETWEEN}.*", re.DOTALL)
    for split, words in _WORDS.items()
}

COUNTED_FILES = 100
"""Most data files whose rows are counted to say what a split that is left out holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """How the files of a dataset are divided."""

    rule: Rule
    files: Mapping[str, Sequence[str]]
    """The data files of each split that has any: train, validation and test first, then others by name."""
    spare: Sequence[str]
    """Data files that are in no split."""


def find_splits(paths: Iterable[str], declared: Rule | None = None) -> Splits | None:
    """The splits of the data files `paths`; None where nothing tells of any. `declared` is what the card says."""
    paths = sorted(paths)
    for rule in (declared, _sharded, _by_folder, _by_name):
        if rule is not None and (splits := divided(paths, rule)).files:
            return splits
    return None


def splits_of_pictures(paths: Collection[str]) -> tuple[Splits | None, str]:
    """`find_splits` for files of which each is one picture, and a note where words such as train may mean no split.

    A folder of trains beside one of ships is no split, nor is test.jpg: folders must leave no picture out or tell
    several splits, names of files both. Of what they tell otherwise, the note says how to have it.
    """
    folders = divided(paths, _by_folder)
    if folders.files and (len(folders.files) > 1 or not folders.spare):
        return folders, ""
    if not folders.files and all(map(_by_name, paths)) and len((names := divided(paths, _by_name)).files) > 1:
        return names, ""
    if folders.files:
        split, inside = next(iter(folders.files.items()))
        return None, f"all folders, also those that may be the split {split} ({len(inside):,}): --split {split}"
    return None, ""


def divided(paths: Iterable[str], rule: Rule) -> Splits:
    """The splits of the data files `paths` by one rule."""
    files: dict[str, list[str]] = {}
    spare = []
    for path in paths:
        splits = rule(path)
        for split in splits:
            files.setdefault(split, []).append(path)
        if not splits:
            spare.append(path)
    order = [*(split for split in _WORDS if split in files), *sorted(files.keys() - _WORDS.keys())]
    return Splits(rule=rule, files={split: files[split] for split in order}, spare=spare)


def chosen_split(place: str, found: Collection[str], asked: str | None) -> str:
    """The split of those `found` in `place` that is taken: the one `asked` for, else train; raises SourceError."""
    if (asked or "train") in found:
        return asked or "train"
    names = readable(", ".join(found))
    first = readable(next(iter(found)))
    raise SourceError(
        f"{place} has no split {asked or 'train'!r}; found {names}; give one of those, e.g. --split {first}"
    )


def no_splits(place: str, asked: str) -> SourceError:
    """The error of a --split for what has none."""
    return SourceError(
        f"--split {asked!a} was given, but {place} has no splits; expected folders or files named after them, such as "
        "data/train-00000-of-00001.parquet or test/; leave it out to take all"
    )


def split_note(split: str, others: Mapping[str, str]) -> str:
    """What to say of the split that is taken; `others` are those left out, with their sizes in words, "" if unknown."""
    if not others:
        return f"split {readable(split)}, the only one"
    told = ", ".join(f"{readable(name)} ({size})" if size else readable(name) for name, size in others.items())
    return f"split {readable(split)}; left out: {told}: --split"


def declared_rule(place: str, card: str) -> Rule | None:
    """The rule that a dataset's card (README.md) declares for its files; None where it declares none.

    Raises SourceError where it declares several configurations, none of them the default: they are several datasets.
    """
    configurations = _configurations(card)
    names = [str(each.get("config_name", "default")) for each in configurations]
    defaults = [each for each in configurations if each.get("default") is True] or [
        each for each, name in zip(configurations, names, strict=True) if name == "default"
    ]
    if len(configurations) > 1 and not defaults:
        shown = readable(", ".join(names[:10])) + (", …" if len(names) > 10 else "")
        raise SourceError(
            f"{place} holds {len(names)} configurations of a dataset, as its README.md says: {shown}; expected one; "
            "give the folder or the files of one"
        )
    if not configurations:
        return None
    declared = (defaults or configurations)[0]
    data_dir = str(declared.get("data_dir") or "").strip("./")
    return _pattern_rule(declared.get("data_files"), data_dir + "/" if data_dir else "")


def _configurations(card: str) -> list[dict[str, object]]:
    head = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if head is None or "configs:" not in head[1]:
        return []
    import yaml

    try:
        about = yaml.safe_load(head[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return []  # a card is for people, too; then the names of the files tell
    found = about.get("configs") if isinstance(about, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _pattern_rule(data_files: object, base: str) -> Rule | None:
    patterns: list[tuple[str, re.Pattern[str]]] = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(split, str) and isinstance(path, str):
                patterns.append((split, name_pattern(base + path.removeprefix("./"))))
    if not patterns:
        return None
    return lambda path: dict.fromkeys(split for split, pattern in patterns if pattern.fullmatch(path))


def name_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of file names, in which * stops at a slash and ** does not."""
    pattern = re.sub(r"(\*\*/)+", "**/", pattern)  # many of them would take for ever
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern)
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    as_set = (
        part.replace("[!", "[^", 1) if part.startswith("[") and len(part) > 1 else re.escape(part) for part in parts
    )
    texts = [signs.get(part, text) for part, text in zip(parts, as_set, strict=True)]
    try:
        return re.compile("".join(texts), re.DOTALL)
    except re.error:
        return re.compile(re.escape(pattern))


def _sharded(path: str) -> Collection[str]:
    match = _SHARDED.fullmatch(path)
    return () if match is None else (match[1],)


def _by_folder(path: str) -> Collection[str]:
    return _of_folder(path.rpartition("/")[0])


@lru_cache(maxsize=1 << 10)
def _of_folder(path: str) -> Collection[str]:
    folders = path.split("/")
    if any(folder.startswith("__") for folder in folders):
        return ()
    return [split for split, word in _FOLDERS.items() if any(map(word.fullmatch, folders))]


def _by_name(path: str) -> Collection[str]:
    *folders, name = path.split("/")
    if any(folder.startswith("__") for folder in folders):
        return ()
    return [split for split, word in _FILES.items() if word.fullmatch(name)]
