"""Patterns of names with braces, which stand for tars, as a shell reads them."""

import re
from collections.abc import Sequence
from pathlib import Path

from kcache.errors import SourceError
from kcache.hints import near_names
from kcache.places import Place
from kcache.places.bucket import BucketPath
from kcache.places.fetching import missing
from kcache.urls import store_url

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_MAX_TARS = 1_000_000


def expand_braces(spec: str) -> list[tuple[str, Place]]:
    """The files that a pattern such as "shards/{00000..00099}.tar" or "{a,b}/{0..9}.tar" means, and what to call each.

    They are called by their path from the last folder before the first brace. Raises SourceError.
    """
    start = spec.rfind("/", 0, spec.find("{")) + 1
    texts, place_of = _expansions(spec), Path if store_url(spec) is None else BucketPath.of
    tars: list[tuple[str, Place]] = [(text[start:], place_of(text)) for text in texts]
    if texts == [spec] or not all(label.endswith(".tar") for label, _ in tars):
        raise SourceError(f"{spec!r} is no pattern for tars; expected one such as {{00000..00099}}.tar; correct it")
    paths = [path for _, path in tars]
    if lacking := set(missing(paths) if place_of is not Path else [path for path in paths if not path.is_file()]):
        folder, first = Path(spec[:start] or "."), next(label for label, path in tars if path in lacking)
        near = "" if folder.exists() or store_url(spec) else near_names(folder)
        raise SourceError(
            f"{len(lacking):,} of the {len(tars):,} tars that {spec!r} stands for are missing, such as {first}; "
            f"expected all of them; {f'did you mean the folder {near}? C' if near else 'c'}orrect the pattern or "
            "restore the files"
        )
    return tars


def _expansions(spec: str) -> list[str]:
    texts = [""]
    position = 0
    for braces in _BRACES.finditer(spec):
        choices = _choices(braces[1])
        if len(choices) * len(texts) > _MAX_TARS:
            raise SourceError(f"{spec!r} stands for more than {_MAX_TARS:,} files; expected fewer; correct the range")
        between = spec[position : braces.start()]
        texts = [text + between + choice for text in texts for choice in choices]
        position = braces.end()
    return list(dict.fromkeys(text + spec[position:] for text in texts))


def _choices(body: str) -> Sequence[str]:
    numbers = _RANGE.fullmatch(body)
    if numbers is None:
        return body.split(",") if "," in body else [f"{{{body}}}"]
    first, last = numbers.groups()
    padded = any(len(text) > 1 and text.startswith("0") for text in numbers.groups())
    width = max(len(first), len(last)) if padded else 1
    step = 1 if int(first) <= int(last) else -1
    values = range(int(first), int(last) + step, step)
    # One more than is allowed tells the caller, without making a list of what a slip of the finger may ask for.
    return [f"{value:0{width}d}" for value in values[: _MAX_TARS + 1]]
