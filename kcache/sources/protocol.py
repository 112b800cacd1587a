"""What a source of images and captions offers to a build, whatever it is stored as."""

from collections.abc import Sequence
from typing import Protocol

from kcache.store.digests import DigestMemo
from kcache.store.samples import Refusal


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
