"""Files to be digested in pieces, by whoever sees them, for a memo that is asked later."""

from collections.abc import Callable, Sequence
from typing import Protocol

from kcache.disk.memo import DigestMemo


class Piece(Protocol):
    """Some of what will be asked of a memo, to be found out by itself; what it says of itself is small."""

    @property
    def name(self) -> str:
        """What it is, in a few words."""

    def is_known(self, memo: DigestMemo) -> bool:
        """Whether `memo` knows all that `look` would find out; raises StoreError."""

    def look(self, memo: DigestMemo) -> None:
        """Have `memo` know what it will be asked; raises InputRejected or OSError, StoreError among them."""


Ahead = Callable[[Sequence[Piece], DigestMemo], None]
"""Told of pieces before what is in them is asked for: what it has the memo know is not digested again."""


def nobody(pieces: Sequence[Piece], memo: DigestMemo) -> None:
    """Finds out nothing ahead: whoever asks does."""
