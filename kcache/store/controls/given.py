"""A control image as a source gives it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ControlImage:
    """The bytes of the file of a control image, and of its picture's."""

    content: bytes
    picture: bytes
    mirrored: bool = False
    """Whether the mirror image is meant."""
