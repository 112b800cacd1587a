"""Width and height of a build's pictures: from what is recorded, from headers before they are decoded, or decoded for.

The size of a picture is that with which it was decoded, whatever its header says: where both differ, what was planned
by the header is recorded as absent from its table, and planned anew.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kcache.build.committed import recorded_sizes
from kcache.build.pictures.contents import fetcher
from kcache.build.pictures.remembered import remember, remembered
from kcache.config import Say
from kcache.config.shapes import NO_SHAPE
from kcache.disk.scratch import spans
from kcache.errors import InputRejected, KcacheError
from kcache.machine import threads_for
from kcache.stopping import stop_here
from kcache.store.digests import Keys, mirrored_key
from kcache.store.formats.columns import Samples
from kcache.store.formats.picture_sizes import Sizes, with_sizes
from kcache.store.formats.side_files import SIZES
from kcache.store.manifest import Manifest, read_manifest
from kcache.store.recipe import kind_of
from kcache.store.samples import Refusal, Sample, samples_in_columns
from kcache.store.shards import Rejection

if TYPE_CHECKING:
    import pyarrow

    from kcache.build.survey import Survey

Found = TypeVar("Found")

_REPORT_SECONDS = 10.0
"""How often it is said of how many pictures the sizes were found."""
_TOGETHER = 1 << 12
"""Pictures that wait for the threads at a time."""
_CHANGED = InputRejected("source", "its content changed while the cache was being built; build again")


def sized(job: "Survey", say: Say) -> "Survey":
    """The job, its samples with the sizes of their pictures where shapes depend on these; who is too small is refused.

    Sizes that nothing has recorded are read from the files' headers, once on this machine; they are 0 where these
    cannot be read.
    """
    if all(each.is_square for each in job.wants.sets):
        return job
    sizes = Sizes(_earlier(job))
    sizes.add(recorded_sizes(job.folder, {**job.earlier, **job.recipes}))
    keys = Samples.of(job.samples).image_keys
    if lacking := keys[sizes.find(keys) < 0].unique():
        sizes.add(remembered(lacking))
    if lacking := keys[sizes.find(keys) < 0].unique():
        sizes.add([_by_headers(job, lacking, say)])
    columns = Samples.of(job.samples)
    at = sizes.find(keys)
    return _of_some_shape(job, columns.changed(lambda table, span: with_sizes(table, sizes.at(at[span]))))


def resized(job: "Survey") -> "Survey":
    """The job, its samples with the sizes with which their pictures were decoded meanwhile."""
    if all(each.is_square for each in job.wants.sets):
        return job
    # One that finishes a cache of tars removes what it had recorded beside them.
    columns, sizes = Samples.of(job.samples), Sizes(_earlier(job, but=job.manifest))
    sizes.add(recorded_sizes(job.folder, job.recipes))
    at = sizes.find(columns.image_keys)

    def corrected(table: "pyarrow.Table", span: slice) -> "pyarrow.Table":
        here = at[span]
        rows = np.zeros(len(table), SIZES)
        rows["width"], rows["height"] = table["width"].to_numpy(), table["height"].to_numpy()
        rows[here >= 0] = sizes.at(here[here >= 0])
        return with_sizes(table, rows)

    return _of_some_shape(job, columns.changed(corrected))


def _of_some_shape(job: "Survey", samples: Samples) -> "Survey":
    """The job with those of its `samples` that have a row at some resolution at least."""
    fits = np.zeros(len(samples), np.bool_)
    for each in job.wants.sets:
        fits |= samples.in_shapes(each) != NO_SHAPE
    refused = [
        Refusal(
            name=sample.name,
            stage="shape",
            reason=f"{sample.width}×{sample.height} pixels would have to be enlarged too much at every resolution "
            f"({', '.join(each.name for each in job.wants.sets)}); --max-upscale raises the limit",
        )
        for sample in samples.where(~fits)
    ]
    return replace(job, samples=samples.where(fits), refused=[*job.refused, *refused])


def _earlier(job: "Survey", but: Manifest | None = None) -> Samples:
    """The samples of the finished cache, whose sizes are known; none where it is that of `but`, or cannot be read."""
    try:
        manifest = read_manifest(job.folder)
        return Samples(()) if manifest == but else samples_in_columns(job.folder, manifest)
    except KcacheError:
        return Samples(())


def _by_headers(job: "Survey", keys: Keys, say: Say) -> np.ndarray:
    """Of `SIZES`: the pictures of `keys`, as the headers of their files say."""
    from kcache.encoders.decoding import picture_size

    images = next(name for name in job.recipes if kind_of(name).per == "image")
    fetch = fetcher(job, images)

    def size(key: bytes) -> tuple[int, int]:
        try:
            content = fetch(key)
        except InputRejected:
            return 0, 0  # which the build finds, too, and names
        return picture_size(content) if isinstance(content, bytes) else (0, 0)

    sizes = np.zeros(len(keys), SIZES)
    sizes["key"] = keys.packed
    try:
        for number, found in enumerate(_each(job, keys, size, say)):
            sizes["width"][number], sizes["height"][number] = found
    finally:  # a signal may have ended it, and whoever builds again goes on from here
        remember(sizes)
    return sizes


def _each(job: "Survey", keys: Keys, find: Callable[[bytes], Found], say: Say) -> Iterator[Found]:
    """What `find` finds of each key, by several threads; `say` is told how far it is."""
    begun = reported = time.monotonic()
    with ThreadPoolExecutor(threads_for(job.config.num_workers), "kcache-decode") as pool:
        try:
            # A pool takes all it is given at once, and some 2 kB for each.
            found_of = (found for span in spans(len(keys), _TOGETHER) for found in pool.map(find, keys[span]))
            for number, found in enumerate(found_of):
                stop_here()
                if (now := time.monotonic()) - reported >= _REPORT_SECONDS:
                    reported, rate = now, max(number, 1) / (now - begun)
                    say(
                        f"found the sizes of {number:,} of {len(keys):,} pictures, {rate:,.0f}/s, "
                        f"{(len(keys) - number) / rate:,.0f} s left"
                    )
                yield found
        finally:
            pool.shutdown(cancel_futures=True)


def refusal_of(name: str, key: bytes, rejected: Mapping[bytes, Rejection | InputRejected]) -> Refusal:
    """Why the input with `key`, of the sample called `name`, has not all of its rows."""
    rejection = rejected.get(key) or rejected.get(mirrored_key(key)) or _CHANGED
    return Refusal(name=name, stage=rejection.stage, reason=rejection.reason)


class PictureSizes:
    """Width and height of a build's pictures, as decoded: found where that is known, and decoded for only where not."""

    def __init__(self, job: "Survey", say: Say) -> None:
        self._job = job
        self._say = say
        self._refused: dict[bytes, InputRejected] = {}

    @cached_property
    def _sizes(self) -> Sizes:
        """Those of the cache before; without them, what was recorded counts, or is found again."""
        return Sizes(self._job.before)

    def readable(self, samples: Samples) -> Samples:
        """The samples without those of which it was found that their picture cannot be read any more."""
        return samples.where(~samples.image_keys.among(self._refused))

    def measured(self, samples: Sequence[Sample]) -> tuple[Samples, list[Refusal]]:
        """The samples with the sizes of their pictures; and those whose picture cannot be read any more."""
        columns = Samples.of(samples)
        if self._lacking(columns):
            # Shards of an interrupted build by a kcache before this one have no sizes.
            self._sizes.add(recorded_sizes(self._job.folder, self._job.recipes))
            if lacking := self._lacking(columns):
                self._measure(lacking)
        at = self._sizes.find(columns.image_keys)
        refused = [refusal_of(sample.name, sample.image_key, self._refused) for sample in columns.where(at < 0)]
        there, at = columns.where(at >= 0), at[at >= 0]
        return there.changed(lambda table, span: with_sizes(table, self._sizes.at(at[span]))), refused

    def _lacking(self, samples: Samples) -> Keys:
        """The pictures of which nothing is known."""
        keys = samples.image_keys
        lacking = keys[self._sizes.find(keys) < 0].unique()
        return lacking[~lacking.among(self._refused)]

    def _measure(self, keys: Keys) -> None:
        """Decode the pictures of `keys` for their sizes, which nothing recorded."""
        from kcache.encoders.decoding import Decoding, decode_image

        images = next(name for name in self._job.recipes if kind_of(name).per == "image")
        fetch, how = fetcher(self._job, images), Decoding()

        def size(key: bytes) -> tuple[int, int] | InputRejected:
            try:
                content = fetch(key)
                return decode_image(content, how).size if isinstance(content, bytes) else _CHANGED
            except InputRejected as error:
                return error

        sizes = np.zeros(len(keys), SIZES)
        sizes["key"] = keys.packed
        for number, (key, found) in enumerate(zip(keys, _each(self._job, keys, size, self._say), strict=True)):
            if isinstance(found, InputRejected):
                self._refused[key] = found
            else:
                sizes["width"][number], sizes["height"][number] = found
        self._sizes.add([sizes[sizes["width"] > 0]])
