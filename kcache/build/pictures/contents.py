"""From the key of a row to the content behind it, as the source of a build gives it now."""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from kcache.sources import Source
from kcache.store.controls.given import ControlImage
from kcache.store.digests import EMPTY_CAPTION_KEY, Keys, content_key, control_row_keys, mirrored_key
from kcache.store.formats.columns import Samples
from kcache.store.recipe import kind_of

if TYPE_CHECKING:
    from kcache.build.survey import Survey


Fetch = Callable[[bytes], bytes | str | ControlImage | None]
"""The content behind a key, None when the source no longer has it; may raise InputRejected."""


class MirrorImage(bytes):
    """The bytes of an image file where what is meant is the mirror image of the picture in it."""

    __slots__ = ()


def as_named(content: bytes, key: bytes) -> bytes | None:
    """The bytes of an image file as `key` names them, the picture or its mirror image; None where it names others."""
    found = content_key(content)
    if found == key:
        return content
    return MirrorImage(content) if mirrored_key(found) == key else None


def fetcher(job: "Survey", table: str) -> Fetch:
    """A function from a key of `table` to its content, None where the source no longer gives that content."""
    # One or the other: a file that holds the text of a caption has that caption's key.
    if kind_of(table).per == "caption":
        samples = _captioned(job)
        return lambda key: samples.texts((key,)).get(key)

    if kind_of(table).per == "control":
        return _control_fetcher(job, kind_of(table).name)

    def fetch(key: bytes) -> bytes | str | None:
        number, mirrored = job.positions.find((key, mirrored_key(key))).tolist()
        content = job.source.image(max(number, mirrored)) if max(number, mirrored) >= 0 else None
        return None if content is None else as_named(content, key)

    job.positions.find(())  # likewise
    return fetch


def shard_fetcher(job: "Survey", table: str) -> Callable[[Sequence[bytes]], Fetch]:
    """As `fetcher`, for the keys of one shard after the other: captions are looked up together, in a fraction of it."""
    if kind_of(table).per == "caption":
        samples = _captioned(job)
        return lambda keys: samples.texts(keys).get
    fetch = fetcher(job, table)
    return lambda _: fetch


def _captioned(job: "Survey") -> Samples:
    samples = Samples.of(job.samples)
    samples.texts((EMPTY_CAPTION_KEY,))  # sorted now, as each of the threads that ask would do it by itself
    return samples


def control_as_named(source: Source, number: int, name: str, key: bytes) -> ControlImage | None:
    """The control image called `name` of a sample of a source as `key` names it; None where it or its picture changed.

    The key is that of the row, or of its mirror image's.
    """
    picture, content = source.image(number), source.control(number, name)
    pair = control_row_keys(Keys.of([content_key(picture)]), Keys.of([content_key(content)]), None)[0]
    return ControlImage(content, picture, mirrored=pair != key) if key in (pair, mirrored_key(pair)) else None


def _control_fetcher(job: "Survey", name: str) -> Fetch:
    positions = job.controls[name]

    def fetch(key: bytes) -> ControlImage | None:
        number = max(positions.find((key, mirrored_key(key))).tolist())
        return None if number < 0 else control_as_named(job.source, number, name, key)

    positions.find(())  # sorted now
    return fetch


def still_given(job: "Survey", table: str, keys: Collection[bytes]) -> set[bytes]:
    """Those of `keys` of a table whose content the source of `job` gives now."""
    fetch = fetcher(job, table) if keys else None
    return {key for key in keys if fetch and fetch(key) is not None}
