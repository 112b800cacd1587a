"""Opening a finished cache and reading rows of it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kcache.config.shapes import Shape, ShapeSet
from kcache.disk.readers import Reading
from kcache.errors import CacheCorruptError, ConfigError
from kcache.places import Place, cache_place
from kcache.places.fetching import missing
from kcache.store.controls.packed import unpacked_rows
from kcache.store.formats.sample_extras import Counts
from kcache.store.index import bytes_of, open_index
from kcache.store.manifest import Manifest, read_manifest
from kcache.store.recipe import Field, Recipe, kind_of
from kcache.store.rows import Empty, FieldFiles, field_files, gather, take, unit_bytes
from kcache.store.samples import read_columns, read_samples, read_some_samples
from kcache.store.selection import columns_named, matching_samples, numbered
from kcache.store.shaped.choice import Reads
from kcache.store.shaped.held import Held
from kcache.store.shards import OFFSETS

if TYPE_CHECKING:
    import pyarrow


class Cache:
    """A finished cache, opened for reading; `len(cache)` is its number of samples.

    Nothing of it is loaded: files are mapped when first read, and any number of threads may read at once. As long as
    it, or a selection of it, is there, nothing is removed from the cache's folder; building goes on beside it.
    """

    def __init__(
        self, path: Place, manifest: Manifest, held: Held, reading: Reading | None = None, copies: Place | None = None
    ) -> None:
        """`held` are its samples, all or some; shards are read in `copies`, where given."""
        self._reading = reading
        self._copies = copies
        self.path = path
        self.manifest = manifest
        self.held = held
        """Which samples these are, and where their rows stand."""
        self._files: dict[str, FieldFiles] = {}
        self._resident: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._asked: dict[str, np.ndarray] = {}
        self._stays: dict[str, bool] = {}

    @classmethod
    def open(
        cls,
        path: str | Place,
        resolution: int | Sequence[int] | None = None,
        buckets: bool | None = None,
        flip: bool | None = None,
    ) -> "Cache":
        """Open the cache at `path`, a folder or a URL.

        Where it holds several, `resolution` (pixels; one, or several to read one after another) picks the latents, and
        `buckets` whether those of shapes or of squares; `flip` False leaves mirrored pictures out, True asks for them.
        Raises CacheNotFoundError, CacheMismatchError, CacheIncompleteError, CacheCorruptError or CacheBusyError.
        """
        folder = cache_place(path)
        reading = Reading(folder)  # before anything is read: what is read next is not removed any more
        manifest = read_manifest(folder)
        reads = Reads.of(folder, manifest, {}, resolution, buckets, flip)
        shards = dict.fromkeys(folder / shard.data for entry in manifest.tables.values() for shard in entry.shards)
        if lacking := missing(shards):
            raise CacheCorruptError(
                f"{folder} lacks {len(lacking)} of its {len(shards)} shards, such as {lacking[0]}; if it was copied, "
                "finish that, else build the cache again with its source to encode them anew"
            )
        held = Held.all_of(replace(reads, arrays=open_index(folder, manifest)))
        return cls(folder, manifest, held, reading)

    def __len__(self) -> int:
        return len(self.held)

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}, {len(self)} samples, {', '.join(sorted(self.manifest.tables))})"

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipe of each table."""
        return {name: entry.recipe for name, entry in self.manifest.tables.items()}

    @property
    def models(self) -> Mapping[str, Mapping[str, str | None]]:
        """Where the encoders came from: {"prior": {"name", "revision"}, "decoder": …}."""
        return self.manifest.models

    @property
    def samples_digest(self) -> str:
        """sha256 (hex) of the samples and their order."""
        return self.held.digest(self.manifest.samples_digest)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the recipes and the samples: equal caches train equal models."""
        return replace(self.manifest, samples_digest=self.samples_digest).fingerprint

    @cached_property
    def samples(self) -> "pyarrow.Table":
        """The samples: id, name, image_key, captions, caption_keys, width, height, weight, repeats, control_keys."""
        table = read_samples(self.path, self.manifest)
        return table if self.held.selected is None else table.take(self.held.selected)

    def told(self, sample: int, column: str) -> Any:
        """What `samples` say in a column of one of them, without all of them in memory."""
        number = sample if self.held.selected is None else int(self.held.selected[sample])
        [found] = read_some_samples(self.path, self.manifest, np.array([number]), [column])
        return found[column]

    def parts(self, columns: Collection[str]) -> "Iterator[tuple[np.ndarray, pyarrow.Table]]":
        """The samples in some `columns` at least, some ten thousand at a time, and their numbers (n,) int64."""
        return numbered(read_columns(self.path, self.manifest, columns), self.held.selected)

    @property
    def caption_bounds(self) -> np.ndarray:
        """(N + 1,) int64: sample i has the captions caption_bounds[i] to caption_bounds[i + 1]."""
        return self.held.caption_bounds

    @property
    def counts(self) -> Counts:
        """What the loss of each sample counts, and how often it comes in an epoch, as far as any says either."""
        return self.held.counts

    @property
    def index(self) -> Mapping[str, np.ndarray]:
        """What `open_index` gives of the samples; a table that not all have a row in only its part has: `by_shape`."""
        return self.held.index

    def where(self, expression: str) -> "Cache":
        """The same cache with only the samples for which `expression` holds, e.g. "width >= 512 and tokens <= 40".

        Columns: id, name, captions, width, height, weight, repeats, n_captions (of the sample), tokens (of its longest
        caption), and by rows, see `kcache.store.likeness`, caption_cosine (of its least fitting caption), duplicate and
        duplicate_cosine. Raises ConfigError for what is not understood, see `kcache.store.selection`, or never holds.
        """
        # Not at the top: `import kcache` is quick, and few expressions are asked.
        from kcache.store.likeness.columns import Columns

        holds, columns = np.zeros(len(self), np.bool_), Columns(self)
        for numbers, part in self.parts(columns_named(expression)):
            holds[numbers[matching_samples(expression, columns.of(numbers, part))]] = True
        if not holds.any():
            raise ConfigError(f"{expression!r} holds for none of the {len(self)} samples of {self.path}; loosen it")
        return self.select(np.flatnonzero(holds))

    def select(self, samples: Sequence[int] | np.ndarray) -> "Cache":
        """The same cache with only `samples`, in the order given; raises IndexError for one that is not there."""
        numbers = self.held.checked(samples)
        if len(numbers) == len(self) and np.array_equal(numbers, np.arange(len(self))):
            return self
        return self._with(self.held.select(numbers))

    def _with(self, held: Held) -> "Cache":
        return Cache(self.path, self.manifest, held, self._reading, self._copies)

    def with_rows_in(self, folder: Place) -> "Cache":
        """The same samples, their rows read from copies of the shards in `folder`."""
        return Cache(self.path, self.manifest, self.held, self._reading, folder)

    @property
    def shape_sets(self) -> tuple[ShapeSet, ...]:
        """What pictures are cropped to, of the resolutions that are read."""
        return self.held.reads.sets

    @property
    def resolution(self) -> int | None:
        """Pixels of the side of a square of the area of all latents; None where there are none, or several such."""
        return self.held.reads.resolution

    @property
    def shape(self) -> Shape | None:
        """Height and width in pixels of the pictures behind all latents; None where they are not of one shape."""
        return self.held.reads.shape

    @property
    def flip(self) -> bool:
        """Whether there are rows of the mirrored pictures."""
        return self.held.reads.flip

    def by_shape(self, *fields: str) -> "tuple[Cache, ...]":
        """The samples in parts in which all rows of `fields` have one shape, by resolution and in order of its list.

        Each is a cache of its own; parts without a sample are left out. Where one shape is all there is, it is the
        cache itself. Raises ConfigError where it is not clear which resolutions, or whether buckets, are meant.
        """
        parts = self.held.parts(fields)
        return (self,) if parts is None else tuple(map(self._with, parts))

    def of_table(self, table: str) -> "Cache":
        """The samples that have a row in a table, with that one of its kind; of the first set that has its shape."""
        return self._with(self.held.of_table(table))

    def having(self, *fields: str) -> "Cache":
        """The samples that have rows of all `fields`: those are left out whose picture is too small for any shape."""
        there = self.held.having(fields)
        return self if there is None else self.select(np.flatnonzero(there))

    def table_of(self, field: str) -> str:
        """The table that holds `field`; raises CacheIncompleteError when there is none, ConfigError when several."""
        return self.held.reads.table_of(field)

    def entries(self, field: str) -> np.ndarray:
        """Where the rows of `field` stand that `positions` name: its table's index, the mirrored ones behind it."""
        return self.held.entries(self.table_of(field))

    def field(self, name: str) -> Field:
        """Shape of one row of `name`, and whether it is ragged."""
        recipe = self.recipes[self.table_of(name)]
        return next(field for field in recipe.fields if field.name == name)

    def is_packed(self, name: str) -> bool:
        """Whether rows of `name` are control images, packed; as `read` gives them they are (B, C, H, W) uint8."""
        return kind_of(self.table_of(name)).per == "control"

    def dtype(self, name: str) -> np.dtype[np.generic]:
        """Dtype of the rows of `name`, as stored."""
        return np.dtype(self.recipes[self.table_of(name)].stored_dtype)

    def read(
        self,
        samples: Sequence[int] | np.ndarray,
        fields: Sequence[str],
        caption: int | np.ndarray = 0,
        *,
        drop_caption: np.ndarray | None = None,
        drop_image: np.ndarray | None = None,
        mirrored: np.ndarray | None = None,
        empty: Empty = np.empty,
    ) -> dict[str, np.ndarray]:
        """Rows of `fields` for `samples`, in the order asked, in new arrays of the stored dtype.

        Fixed fields are (B, …), `text_encoder_hidden_states` is (T, D), all samples' valid tokens behind each other,
        and brings `text_offsets` (B + 1,) int64: sample i's tokens are text_offsets[i] to text_offsets[i + 1].
        `caption` is the number of the caption to take, one for all or one per sample. Samples in `drop_caption` (B,)
        bool get the rows of the empty caption, those in `drop_image` the image_embeds of the all-zero image: the
        condition left out, as classifier-free guidance needs it. Those in `mirrored` get the rows of the mirror image
        of their picture. `empty` makes the arrays. Checksums are verified: each time, or once by `make_resident`.
        Raises CacheCorruptError, CacheIncompleteError for a field, IndexError for a sample or caption not there.
        """
        rows: dict[str, np.ndarray] = {}
        positions = self.positions(
            samples, fields, caption, drop_caption=drop_caption, drop_image=drop_image, mirrored=mirrored
        )
        for name in fields:
            rows[name], offsets = self._read_field(name, positions[name], empty)
            if offsets is not None:
                rows[OFFSETS] = offsets
        return rows

    def positions(
        self, samples: Sequence[int] | np.ndarray, fields: Sequence[str], caption: int | np.ndarray = 0, **without: Any
    ) -> dict[str, np.ndarray]:
        """Which rows of each field's table `read` takes for the same arguments: (B,) int64 per field."""
        found = self.held.positions(samples, [*map(self.table_of, fields)], caption, **without)
        return dict(zip(fields, found, strict=True))

    def table_rows(self, name: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows `first` to `last` of the table of `name`, in the order of `positions`, every checksum verified.

        Fixed rows are (n, …), None; ragged ones (T, …) and (n + 1,) int64, where each of them starts.
        """
        return gather(self.field_files(name), self.entries(name)[first:last], np.empty)

    def table_length(self, name: str) -> int:
        """Rows that `positions` can name for a field: one per sample, or per caption, and the reserved one."""
        return len(self.entries(name))

    def field_files(self, name: str) -> FieldFiles:
        """The files behind `name`, opened when first read."""
        if name not in self._files:
            shards = self.manifest.tables[self.table_of(name)].shards
            self._files[name] = field_files(self.path, self.field(name), self.dtype(name), shards, self._copies)
        return self._files[name]

    def resident_bytes(self, fields: Sequence[str]) -> int:
        """Memory that `make_resident(fields)` takes."""
        return sum(
            bytes_of(self.entries(name), name)
            if self.field(name).ragged
            else self.table_length(name) * unit_bytes(self.field(name), self.dtype(name))
            for name in fields
        )

    def unread_bytes(self, fields: Sequence[str]) -> int:
        """Bytes of the index that the rows of `fields` are found by and that nobody has asked for yet."""
        arrays = [self.caption_bounds, *map(self.held.entries, {*map(self.table_of, fields)})]
        return sum(getattr(array, "unread", 0) for array in arrays)

    def make_resident(self, fields: Sequence[str]) -> None:
        """Read all rows of `fields` into memory now, verified; reads are then served from there, unchecked."""
        for name in fields:
            if name not in self._resident:
                self._resident[name] = self.table_rows(name, 0, self.table_length(name))

    def make_mapped(self, fields: Sequence[str], *, stays: bool) -> None:
        """Prepare for random reads of `fields` from mapped files: a read then asks the disk for all its rows at once.

        If the files fit into memory (`stays`), each row is asked for only once.
        """
        for name in fields:
            self._stays[name] = stays
            self._asked.setdefault(name, np.zeros(self.table_length(name), np.bool_))

    def _read_field(self, name: str, positions: np.ndarray, empty: Empty) -> tuple[np.ndarray, np.ndarray | None]:
        if self.is_packed(name):
            return unpacked_rows(self.table_of(name), *self._stored(name, positions, np.empty), empty), None
        return self._stored(name, positions, empty)

    def _stored(self, name: str, positions: np.ndarray, empty: Empty) -> tuple[np.ndarray, np.ndarray | None]:
        if name in self._resident:
            return take(self._resident[name], positions, empty)
        files, entries = self.field_files(name), self.entries(name)[positions]
        if name in self._asked:
            asked = self._asked[name]
            if not asked[positions].all():
                files.will_need(entries[~asked[positions]])
                asked[positions] = self._stays[name]
        return gather(files, entries, empty)
