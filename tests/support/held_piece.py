"""A piece of a source that is held while it is looked through, so that tests can take away who looks."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from kcache.disk.memo import DigestMemo
from kcache.disk.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class HeldPiece:
    """Waits while the file `hold` exists, and says so by a file `held/PID`; then looks as another piece does."""

    piece: Piece
    hold: Path
    held: Path

    @property
    def name(self) -> str:
        return self.piece.name

    def is_known(self, memo: DigestMemo) -> bool:
        return self.piece.is_known(memo)

    def look(self, memo: DigestMemo) -> None:
        if self.hold.exists():
            self.held.mkdir(exist_ok=True)
            (self.held / str(os.getpid())).touch()
            while self.hold.exists():
                time.sleep(0.02)
        self.piece.look(memo)
