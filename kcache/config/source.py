"""How a source of images and captions is read: by a build, by a training run's encoders in the loop, by a check."""

from dataclasses import dataclass, fields

from kcache.settings import setting


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which parts of a source are meant; what a source of its kind has no use for is refused there."""

    image_column: str | None = setting(
        None,
        "Column that holds the image: `image` when left out; in metadata `file_name`, its path; in tars a member, jpg.",
    )
    caption_column: str | None = setting(
        None,
        "Column that holds the caption, or a list of captions: `text` when left out; in tars of .json, or a member.",
    )
    split: str | None = setting(None, "Split of a dataset that has several: `train` when left out.")
    follow_links: str | None = setting(
        None, "Follow the links of a source folder that lead into this folder. Others are refused by name."
    )

    @property
    def flags(self) -> tuple[str, ...]:
        """What was said of the source, as it is typed: --image-column and the like."""
        names = (each.name for each in fields(SourceConfig) if getattr(self, each.name) is not None)
        return tuple(f"--{name.replace('_', '-')}" for name in names)


AS_FOUND = SourceConfig()
"""What a source is by its own conventions, nothing said about it."""
