"""How a source of images and captions is read: by a build, by a training run's encoders in the loop, by a check."""

import re
from collections.abc import Collection
from dataclasses import dataclass, fields

from kcache.errors import ConfigError
from kcache.settings import setting

_HINT = re.compile("([a-z][a-z0-9_]{0,19})=(.+)", re.DOTALL)


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
    hint_column: tuple[str, ...] = setting(
        (),
        "NAME=COLUMN: where the hint of each picture is, an image that a decoder is to draw by; repeat it for several. "
        "In folders and tars it is what stands in the name: depth=depth for fox.depth.png beside fox.jpg.",
    )
    mask_column: str | None = setting(None, "Column that holds an image of where the hole in each is, in white.")
    loss_mask_column: str | None = setting(
        None, "Column that holds an image of how much each part of the picture counts, white wholly."
    )
    loss_mask_alpha: bool = setting(False, "Let each part of a picture count as much as it is opaque.")
    weight_column: str | None = setting(
        None, "Column that holds what each sample's loss counts beside 1 of others: 0 or more, 1 where it holds none."
    )
    repeats_column: str | None = setting(
        None, "Column that holds how often each sample comes in an epoch: 1 or more, 1 where it holds none."
    )

    @property
    def controls(self) -> dict[str, str | None]:
        """The column of each kind of control image, by the kind's name and sorted; None for the picture's own alpha.

        Raises ConfigError for what names none.
        """
        columns: dict[str, str | None] = {}
        for text in self.hint_column:
            if (found := _HINT.fullmatch(text)) is None:
                raise ConfigError(
                    f"--hint-column is {text!r}; expected NAME=COLUMN, such as depth=depth: a name of up to 20 small "
                    "letters, digits and _, a letter first, and the column"
                )
            if f"hint-{found[1]}" in columns:
                raise ConfigError(f"--hint-column names {found[1]} twice; expected one column for it; leave one out")
            columns[f"hint-{found[1]}"] = found[2]
        if self.loss_mask_alpha and self.loss_mask_column is not None:
            raise ConfigError(
                f"--loss-mask-alpha with --loss-mask-column {self.loss_mask_column}: expected one of the two; leave "
                "the other out"
            )
        if self.mask_column is not None:
            columns["masks"] = self.mask_column
        if self.loss_mask_alpha or self.loss_mask_column is not None:
            columns["loss_masks"] = self.loss_mask_column
        return dict(sorted(columns.items()))

    def check_told(self, source: str, cache: object, controls: Collection[str]) -> None:
        """Raise ConfigError where `source` is to give control images of `controls` and was not told where they are."""
        if lacking := sorted({*controls} - {*self.controls}):
            raise ConfigError(
                f"{source} was not told where its {' and '.join(lacking)} are; expected the flags that {cache} was "
                f"built with; give {' and '.join(map(flag_of, lacking))}"
            )

    @property
    def counts(self) -> dict[str, str]:
        """The column of each number that is asked for of a sample, by its name: "weight" and "repeats"."""
        columns = {"weight": self.weight_column, "repeats": self.repeats_column}
        return {name: column for name, column in columns.items() if column is not None}

    @property
    def flags(self) -> tuple[str, ...]:
        """What was said of the source, as it is typed: --image-column and the like."""
        names = (each.name for each in fields(SourceConfig) if is_said(getattr(self, each.name)))
        return tuple(f"--{name.replace('_', '-')}" for name in names)


AS_FOUND = SourceConfig()
"""What a source is by its own conventions, nothing said about it."""


def is_said(value: object) -> bool:
    """Whether a setting of a source says anything; the empty text does, wrongly."""
    return value == "" or bool(value)


def flag_of(control: str) -> str:
    """The flag that says where control images of a kind are, by the kind's name."""
    if control.startswith("hint-"):
        return f"--hint-column {control.removeprefix('hint-')}=COLUMN"
    return "--mask-column COLUMN" if control == "masks" else "--loss-mask-column COLUMN or --loss-mask-alpha"
