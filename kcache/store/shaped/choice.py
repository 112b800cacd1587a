"""Which sets of shapes of a cache are read, and what is said where that is not clear or not there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kcache.config.shapes import NO_SHAPE, Shape, ShapeSet, resolutions_of
from kcache.errors import CacheIncompleteError, ConfigError
from kcache.places import Place
from kcache.store.formats.index_files import CAPTION_BOUNDS
from kcache.store.manifest import Manifest
from kcache.store.recipe import LATENTS, kind_of, shape_of, table_name
from kcache.store.recorded import build_line
from kcache.store.shaped.standing import Standing
from kcache.store.shaped.wants import MIRRORED


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What of a cache is read: of latents these sets, or one shape of one set, and mirrored pictures or none."""

    folder: Place
    manifest: Manifest
    arrays: Mapping[str, np.ndarray]
    """The index arrays of all samples."""
    sets: tuple[ShapeSet, ...]
    named: bool
    """Whether it was said which resolutions these are: several are meant only then."""
    flip: bool
    number: int | None = None
    """Of the one set the shape that this is the part of; None for all of it."""

    @classmethod
    def of(
        cls,
        folder: Place,
        manifest: Manifest,
        arrays: Mapping[str, np.ndarray],
        resolution: int | Sequence[int] | None,
        buckets: bool | None,
        flip: bool | None,
    ) -> "Reads":
        """What was asked for; raises CacheIncompleteError for what is not there."""
        named = (resolution,) if isinstance(resolution, int) else tuple(resolution or ())
        sets = _chosen_sets(folder, manifest, named, buckets)
        if flip and not manifest.flip:
            line = build_line(folder, manifest, LATENTS.fields[0], more=("--flip",))
            raise CacheIncompleteError(f"{folder} has no rows of mirrored pictures; run `{line}` to add them")
        return cls(
            folder=folder, manifest=manifest, arrays=arrays, sets=sets, named=bool(named),
            flip=manifest.flip if flip is None else flip,
        )  # fmt: skip

    @property
    def standing(self) -> Standing:
        """Which samples have which shape."""
        return Standing(self.manifest.shape_sets, self.arrays, self.manifest.samples)

    @property
    def index(self) -> dict[str, np.ndarray]:
        """The arrays in which all samples have an entry, or one per caption."""
        names = {table for table in self.manifest.tables if not kind_of(table).sided} | {CAPTION_BOUNDS}
        squares = {each.shapes[0] for each in self.manifest.shape_sets if each.is_square}
        names |= {table for table in self.manifest.tables if shape_of(table) in squares}
        names |= {name + MIRRORED for name in names if self.flip}
        return {name: array for name, array in self.arrays.items() if name in names}

    @property
    def resolution(self) -> int | None:
        """The one resolution of all latents; None where there are none, or several."""
        resolutions = resolutions_of(self.sets)
        return resolutions[0] if len(resolutions) == 1 else None

    @property
    def shape(self) -> Shape | None:
        """The one shape of all latents; None where there are none, or several."""
        shapes = {shape for each in self.sets for shape in each.shapes}
        if self.number is not None:
            return self.sets[0].shapes[self.number]
        return shapes.pop() if len(shapes) == 1 else None

    def table_of(self, field: str) -> str:
        """The table that holds `field`; raises CacheIncompleteError when there is none, ConfigError when several."""
        recipes = {name: entry.recipe for name, entry in self.manifest.tables.items()}
        tables = [name for name, recipe in recipes.items() if any(f.name == field for f in recipe.fields)]
        if not tables:
            known = sorted({f.name for recipe in recipes.values() for f in recipe.fields})
            raise CacheIncompleteError(
                f"{self.folder} holds no {field!r}; found {', '.join(known)}; "
                f"run `{build_line(self.folder, self.manifest, field)}` to add what is missing"
            )
        if not kind_of(tables[0]).sided:
            return tables[0]
        sets = self.meant
        if self.number is None and (len(sets) > 1 or not sets[0].is_square):
            names = " and ".join(each.name for each in sets)
            raise ConfigError(
                f"{field} of {self.folder} have several shapes ({names}), or none for pictures that are too small; "
                "expected samples of one: ask a part, of Cache.by_shape"
            )
        return table_name(kind_of(tables[0]), sets[0].shapes[self.number or 0])

    @property
    def meant(self) -> tuple[ShapeSet, ...]:
        """The sets that samples have a row of each of; raises ConfigError where it is not clear which those are."""
        if len(resolutions := resolutions_of(self.sets)) > 1 and not self.named:
            sides = ", ".join(map(str, resolutions))
            raise ConfigError(
                f"{self.folder} holds latents at {sides} pixels; say which: --resolution, or "
                "Cache.open(…, resolution=…)"
            )
        for each in resolutions:
            if len(both := [found for found in self.sets if found.resolution == each]) > 1:
                raise ConfigError(
                    f"{self.folder} holds latents of {_names(both)} pixels; say which: --aspect-ratio-buckets or "
                    "--no-aspect-ratio-buckets, or Cache.open(…, buckets=…)"
                )
        return self.sets

    def parts(self, fields: Sequence[str]) -> "list[Reads] | None":
        """The parts in which all samples have the same shapes of `fields`; None where that is all of it."""
        sided = any(
            field in kind_of(table).fields for field in fields for table in self.manifest.tables if shape_of(table)
        )
        if self.number is not None or not sided or not self.sets:
            return None
        if len(self.meant) == 1 and self.meant[0].is_square:
            return None
        return [
            replace(self, sets=(each,), named=True, number=number)
            for each in self.meant
            for number in range(len(each.shapes))
        ]

    def have_rows(self) -> np.ndarray | None:
        """(N,) bool: which of all samples have latents of one of the sets; None for all."""
        if any(each.is_square for each in self.meant) or not self.sets:
            return None
        return np.logical_or.reduce([self.standing.numbers(each) != NO_SHAPE for each in self.sets])


def _chosen_sets(folder: Place, manifest: Manifest, named: Sequence[int], buckets: bool | None) -> tuple[ShapeSet, ...]:
    if lacking := [each for each in named if each not in resolutions_of(manifest.shape_sets)]:
        raise CacheIncompleteError(
            f"{folder} has no table latents-{lacking[0]}; found {', '.join(sorted(manifest.tables))}; "
            f"run `{build_line(folder, manifest, 'latents', lacking[0])}`"
        )
    sets = [each for each in manifest.shape_sets if not named or each.resolution in named]
    chosen = [each for each in sets if buckets in (None, not each.is_square)]
    if absent := sorted({*resolutions_of(sets)} - {*resolutions_of(chosen)}):
        flags = ("--aspect-ratio-buckets", "auto" if buckets else "square")
        asked = "--aspect-ratio-buckets asks for buckets" if buckets else "--no-aspect-ratio-buckets asks for squares"
        line = build_line(folder, manifest, LATENTS.fields[0], absent[0], more=flags)
        raise CacheIncompleteError(
            f"{asked}, and {folder} has latents of {_names(sets)} pixels; run `{line}` to add what is missing"
        )
    return tuple(chosen)


def _names(sets: Sequence[ShapeSet]) -> str:
    return " and ".join(each.name for each in sets)
