"""Counts in words, and the sentences that say what of the inputs is not in a cache as it was given."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Counts of what trains otherwise than one may think."""

    captions: int = 0
    """All of them; below, how many of these are so."""
    captions_empty: int = 0
    captions_cut: int = 0
    """Longer than the text encoder's input."""
    tokens_cut: int = 0
    """Tokens of these that the encoder has not seen."""
    captions_full: int = 0
    """As long as the text encoder's input, or longer: which of it, nobody counted."""
    longest: int = 0
    """Tokens of the text encoder's input."""
    samples: int = 0
    samples_alike: int = 0
    """Of a picture that a sample before them has."""
    pictures_small: Mapping[int, int] = field(default_factory=dict)
    """Samples whose pictures are smaller than the latents' side, by that side in pixels."""

    @property
    def sentences(self) -> list[str]:
        """One for each count that is not 0."""
        said = []
        if self.captions_cut:
            one = self.captions_cut == 1
            said.append(
                f"{counted(self.captions_cut, 'caption')} {'is' if one else 'are'} longer than {self.longest} tokens: "
                f"{counted(self.tokens_cut, 'token')} of {'it' if one else 'them'} {_were(self.tokens_cut)} not seen"
            )
        if self.captions_full:
            fills = "fills" if self.captions_full == 1 else "fill"
            said.append(
                f"{counted(self.captions_full, 'caption')} {fills} all {self.longest} tokens: how much more there "
                "was is not known; building again counts it"
            )
        if self.captions_empty:
            one = self.captions_empty == 1
            said.append(
                f"{self.captions_empty:,} of {counted(self.captions, 'caption')} {'is' if one else 'are'} empty: "
                f"{'it trains' if one else 'they train'} without a text"
            )
        if self.samples_alike:
            have = "has" if self.samples_alike == 1 else "have"
            said.append(f"{self.samples_alike:,} of {counted(self.samples, 'sample')} {have} the picture of one before")
        for side, count in self.pictures_small.items():
            if count:
                are = "is" if count == 1 else "are"
                said.append(
                    f"{count:,} of {counted(self.samples, 'picture')} {are} smaller than {side} pixels, and scaled up"
                )
        return said


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 sample", "1,797 samples"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
