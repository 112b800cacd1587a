"""Which shapes, and whether mirrored pictures, a build was asked for, in view of those that its cache has."""

from collections.abc import Sequence
from dataclasses import replace

from kcache.config import BuildConfig
from kcache.config.build import DEFAULT_MAX_UPSCALE, DEFAULT_RESOLUTION
from kcache.config.shapes import ShapeSet, auto_set, parse_shapes, resolutions_of, square_set
from kcache.config.source import flag_of
from kcache.errors import ConfigError
from kcache.store.shaped.wants import Wants, in_order


def wanted(config: BuildConfig, had: Wants | None, step: int) -> Wants:
    """What a cache that has what `had` says, None for a new one, has when a build of these settings is done.

    Sides are multiples of `step` pixels. A resolution that is named joins those that there are, other shapes take the
    place of those at theirs, and squares stay beside them. Raises ConfigError.
    """
    before, controls = had or Wants(()), tuple(config.controls)
    flip = before.flip if config.flip is None else config.flip
    if lacking := [name for name in before.controls if name not in controls]:
        raise ConfigError(
            f"the cache has rows of {', '.join(lacking)}, and this build was not told where these images are now; "
            f"expected the flags that it was built with; give {' and '.join(map(flag_of, lacking))} again"
        )
    if config.stage == "prior" and not before.sets and controls:
        raise ConfigError(
            f"{' and '.join(map(flag_of, controls))} with --stage prior, which reads no pictures; expected a cache for "
            "the decoder; leave one of them out"
        )
    if config.stage == "prior":
        return Wants(before.sets, flip, controls)
    resolutions = config.resolution or resolutions_of(before.sets) or DEFAULT_RESOLUTION
    sets = {(each.resolution, each.is_square): each for each in before.sets}
    for each in _named(config, resolutions, before.sets, step):
        sets[each.resolution, each.is_square] = each
    if config.max_upscale is not None:
        changed = [each for each in sets.values() if each.resolution in resolutions and not each.is_square]
        if not changed:
            raise ConfigError(
                f"--max-upscale is {config.max_upscale:g}, but squares take pictures of any size; expected "
                "--aspect-ratio-buckets beside it; add that, or leave --max-upscale out"
            )
        for each in changed:
            sets[each.resolution, False] = replace(each, max_upscale=config.max_upscale)
    return Wants(in_order(sets.values()), flip, controls)


def _named(config: BuildConfig, resolutions: Sequence[int], before: Sequence[ShapeSet], step: int) -> list[ShapeSet]:
    """The sets that are asked for at `resolutions`."""
    buckets = config.aspect_ratio_buckets
    if buckets is None:
        return [square_set(each) for each in resolutions if each not in resolutions_of(before)]
    if buckets == "square":
        return [square_set(each) for each in resolutions]
    limits = {each.resolution: each.max_upscale for each in before if not each.is_square}
    if buckets == "auto":
        return [auto_set(each, step, limits.get(each, DEFAULT_MAX_UPSCALE)) for each in resolutions]
    if len(resolutions) > 1:
        raise ConfigError(
            f"--aspect-ratio-buckets lists shapes, and there are {len(resolutions)} resolutions "
            f"({', '.join(map(str, resolutions))}); expected one; name the one they are for by --resolution"
        )
    [resolution] = resolutions
    return [ShapeSet(resolution, parse_shapes(buckets), limits.get(resolution, DEFAULT_MAX_UPSCALE))]


def replaced(had: Sequence[ShapeSet], now: Sequence[ShapeSet]) -> list[str]:
    """In words, which shapes of a cache give way to others."""
    notes = []
    for before in had:
        after = next((each for each in now if each.resolution == before.resolution and not each.is_square), before)
        if before.is_square or before.shapes == after.shapes:
            continue
        gone = [f"{height},{width}" for height, width in before.shapes if (height, width) not in after.shapes]
        names = f"{'; '.join(gone[:3])}{'; …' if len(gone) > 3 else ''}"
        left = f", {len(gone)} of them not any more ({names}); their rows stay until `kcache cache-gc`" if gone else ""
        notes.append(f"{before.resolution}: {len(before.shapes)} shapes → {len(after.shapes)}{left}")
    return notes
