"""What counts as the captions of one sample."""

from pathlib import Path

from kcache.errors import InputRejected
from kcache.sources.paths import MAX_TEXT_BYTES, read_file

__all__ = ["caption_file", "caption_lines", "caption_tuple"]


def caption_tuple(cell: object, *, needed: bool) -> tuple[str, ...]:
    """The captions in one cell of metadata: a string is one caption, a list of strings several.

    An empty string is a caption, the unconditional one. No caption at all is () unless `needed`. Raises InputRejected.
    """
    if cell is None or cell == []:
        if needed:
            raise InputRejected("source", "no caption; give a string, a list of strings, or remove the image")
        return ()
    captions = cell if isinstance(cell, list) else [cell]
    for caption in captions:
        _check_caption(caption)
    return tuple(captions)


def caption_file(path: Path) -> tuple[str, ...]:
    """The captions in a text file, as `caption_lines` takes them; raises InputRejected."""
    try:
        content = read_file(path, MAX_TEXT_BYTES)
    except InputRejected as rejection:
        raise InputRejected("source", f"caption file {path.name!a}: {rejection.reason}") from rejection
    return caption_lines(content, path.name)


def caption_lines(content: bytes, name: str) -> tuple[str, ...]:
    """The captions in text called `name`: each line that is not blank is one; blank text is one empty caption.

    Raises InputRejected.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputRejected("source", f"caption file {name!a} is not UTF-8 text: {error}") from error
    # Not str.splitlines: it also cuts at characters that stand inside captions, such as U+2028.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    captions = [line.strip() for line in lines if line.strip()]
    return caption_tuple(captions or "", needed=True)


def _check_caption(caption: object) -> None:
    if not isinstance(caption, str):
        raise InputRejected(
            "source", f"caption is {_short(caption)}, of type {type(caption).__name__}; expected a string"
        )
    if "\0" in caption:
        raise InputRejected("source", f"caption {_short(caption)} contains a NUL character; remove it")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise InputRejected(
            "source",
            f"caption {_short(caption)} is not valid Unicode text (a lone surrogate or a byte that is "
            f"not UTF-8, at character {error.start}); correct its encoding",
        ) from None


def _short(value: object) -> str:
    # ascii, so that the reason can be printed and written whatever the value holds.
    text = ascii(value)
    return text if len(text) <= 60 else text[:59] + "…"
