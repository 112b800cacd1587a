"""Control images that are files: beside pictures, such as fox.depth.png beside fox.jpg, or named by metadata."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from kcache.config.source import flag_of
from kcache.errors import InputRejected, SourceError
from kcache.plainly import shown
from kcache.sources.listing import one_form
from kcache.sources.reading import stem_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlFiles:
    """The control images of the pictures of a folder."""

    columns: Mapping[str, str | None]
    """Which are asked for, by the name of their kind, as in `SourceConfig.controls`."""
    named: Mapping[str, Mapping[str, str]]
    """Those that metadata names: by picture and kind, their paths."""
    found: Mapping[tuple[str, str], Sequence[str]]
    """Those beside pictures: by what comes before the column in their name, in one Unicode form, and the column."""
    files: set[str]
    """All of these, which are no pictures of their own."""

    @classmethod
    def of(
        cls,
        images: Sequence[str],
        columns: Mapping[str, str | None],
        named: Mapping[str, Mapping[str, str]],
        pictures: Collection[str],
    ) -> Self:
        """Those among `images`; what metadata names both as one and among `pictures` is a picture, too."""
        found: dict[tuple[str, str], list[str]] = {}
        # Of depth and v2.depth, fox.v2.depth.png is called by the latter.
        columns_by_length = sorted({each for each in columns.values() if each}, key=len, reverse=True)
        for path in images if columns_by_length else ():
            stem = one_form(stem_of(path))
            for column in columns_by_length:
                base, ending = stem[: -len(_ending(column))], stem[-len(_ending(column)) :]
                if base and not base.endswith("/") and ending.lower() == _ending(column).lower():
                    found.setdefault((base, column), []).append(path)
                    break
        files = {path for paths in found.values() for path in paths}
        files |= {path for of_picture in named.values() for path in of_picture.values()} - set(pictures)
        return cls(columns=columns, named=named, found=found, files=files)

    def of_picture(self, picture: str) -> list[bytes]:
        """The path of each kind that is asked for, b"" where there is none; raises InputRejected where several are."""
        if not any(self.columns.values()):
            return []
        return [os.fsencode(self._of_kind(picture, name, column)) for name, column in self.columns.items()]

    def _of_kind(self, picture: str, name: str, column: str | None) -> str:
        if (path := self.named.get(picture, {}).get(name)) is not None:
            return path
        bases = (one_form(stem_of(picture)), one_form(picture))
        paths = [path for base in bases for path in self.found.get((base, column or ""), ())]
        if len(paths) > 1:
            names = " and ".join(ascii(path) for path in paths)
            raise InputRejected("source", f"{names} are both its {column}; expected one; remove the others")
        return paths[0] if paths else ""

    def check(self, place: object, pictures: Collection[Sequence[bytes]], metadata: Collection[str]) -> None:
        """Raise SourceError where none of the pictures, each as of `of_picture`, has one that is asked for.

        `metadata` are the columns that there are, if any.
        """
        for number, (name, column) in enumerate(self.columns.items()):
            if column is not None and pictures and not any(paths[number] for paths in pictures):
                held = f", and no metadata has a column {column!a}" if metadata else ""
                found = f"; found {', '.join(shown(each) for each in sorted(metadata))}" if metadata else ""
                raise SourceError(
                    f"{place}: no picture has a file such as 'fox{_ending(column)}.png' beside 'fox.jpg'{held}{found}; "
                    f"correct {flag_of(name)}, or leave it out"
                )

    def alone(self, pictures: Collection[str]) -> dict[str, str]:
        """Those beside none of `pictures`, and why they are not read."""
        if not self.found:
            return {}
        bases = {one_form(base) for picture in pictures for base in (stem_of(picture), picture)}
        return {
            path: f"an image called {_ending(column)} without a picture {base.rpartition('/')[2]!a} that it goes with"
            for (base, column), paths in self.found.items()
            for path in paths
            if base not in bases
        }


def expected_file(picture: str, column: str) -> str:
    """What a control image beside a picture may be called, without its folder."""
    return f"{stem_of(picture).rpartition('/')[2]}{_ending(column)}.png"


def _ending(column: str) -> str:
    """What stands in names behind the picture's: .depth of depth; a column that begins with a sign stands as it is."""
    return one_form(column if column[:1] in "-_." else f".{column}")
