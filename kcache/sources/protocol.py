"""What a source of images and captions is asked for, and what it offers to a build, whatever it is stored as.

A new kind of source is a class with the members of `Source` and a function that gets a `Request`, finds the samples,
notes why anything else is refused, and ends in `refusals`; `open_source` calls it where it finds such a source.
"""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Protocol, Self

from kcache.config import SourceConfig
from kcache.disk.memo import DigestMemo
from kcache.disk.pieces import Ahead, Piece, nobody
from kcache.errors import SourceError
from kcache.plainly import printable
from kcache.sources.reading import readable
from kcache.store.samples import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to take from a source."""

    config: SourceConfig
    """How it is read; a kind of source refuses what it has no use for."""
    max_train_samples: int | None
    """Only the first ones."""
    need_captions: bool
    """Whether an image without captions is refused."""
    memo: DigestMemo | None = None
    """What is known of files already; None for the user's own."""
    ahead: Ahead = nobody
    """Who may look through the source before it is asked."""
    rehash: bool = False
    """Whether what the memo knows of files is found out again."""

    @property
    def alone(self) -> Self:
        """The same, of nothing but what decides what is offered."""
        return replace(self, memo=None, ahead=nobody, rehash=False)

    def look_ahead(self, pieces: Sequence[Piece]) -> None:
        """Have `ahead` look through some pieces."""
        if self.memo is not None:
            self.ahead(pieces, self.memo)

    @property
    def image_column(self) -> str:
        """The column that holds the image, of a dataset of rows."""
        return self.config.image_column or "image"

    @property
    def caption_column(self) -> str:
        """The column that holds the captions, of a dataset of rows or of metadata."""
        return self.config.caption_column or "text"

    @property
    def split(self) -> str:
        """The split that is taken, of a dataset that has several."""
        return self.config.split or "train"


class Source(Protocol):
    """A fixed sequence of samples: one encoded image each, with its captions."""

    @property
    def description(self) -> str:
        """What was found, in one line."""

    @property
    def refused(self) -> Sequence[Refusal]:
        """Everything that was found but is not offered."""

    def __len__(self) -> int:
        """Number of samples offered."""

    def name(self, i: int) -> str:
        """A readable name of sample `i` that stays the same when others are added; valid UTF-8."""

    def captions(self, i: int) -> tuple[str, ...]:
        """All captions of sample `i`; () only where captions are not needed."""

    def image(self, i: int) -> bytes:
        """The bytes of the image file of sample `i`, undecoded; raises InputRejected."""

    def image_key(self, i: int, memo: DigestMemo, rehash: bool) -> bytes:
        """`content_key(image(i))`, from the memo where the files are unchanged; raises InputRejected."""

    def counts(self, i: int) -> tuple[float, int]:
        """How much sample `i` counts beside 1 of others, and how often it comes in an epoch: (1.0, 1) unless told."""

    def control(self, i: int, name: str) -> bytes:
        """The bytes of the file of a control image of the kind `name`; SourceError where that was not asked for."""

    def control_keys(self, i: int, memo: DigestMemo, rehash: bool) -> tuple[bytes, ...]:
        """The `content_key` of each kind of control image that was asked for, `NO_CONTROL` of a mask it lacks."""


def refusals(place: str, samples: Sized, reasons: Mapping[str, str], *, expected: str) -> tuple[Refusal, ...]:
    """What a source refuses, from why each input is, by name; raises SourceError when it found no samples in `place`.

    `expected` tells what would have been samples, and what to do.
    """
    refused = tuple(
        Refusal(name=readable(name), stage="source", reason=printable(reason)) for name, reason in reasons.items()
    )
    if not len(samples):
        examples = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3])
        why = f"all {len(refused):,} inputs found were refused ({examples})" if refused else "it is empty"
        raise SourceError(f"{place} offers no sample: {why}; expected {expected}")
    return refused
