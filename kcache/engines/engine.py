"""Which engine a build was asked for: this process, or the machines of a Ray cluster."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from kcache.build.builder import Builder
from kcache.config import BuildConfig, Say
from kcache.disk.pieces import Ahead, nobody
from kcache.errors import ConfigError


def engine_of(source: str, config: BuildConfig) -> Callable[..., Builder]:
    """What makes the builder of a build of `source`, as `config` says; raises ConfigError for Ray where it is not.

    It is given to `build_cache` as its `engine`.
    """
    if config.engine == "local":
        return Builder
    _check_ray()
    from kcache.engines.ray_builder import RayBuilder

    return partial(RayBuilder, source=source)


def ahead_of(config: BuildConfig, say: Say) -> Ahead:
    """What looks through a source before a survey does, as `config` says; raises ConfigError for Ray where it is not.

    It is given to `build_cache` and `estimate_build` as their `ahead`.
    """
    if config.engine == "local":
        return nobody
    _check_ray()
    from kcache.engines.ahead import look_ahead

    return partial(look_ahead, config, say)


def _check_ray() -> None:
    if find_spec("ray") is None:
        raise ConfigError(
            "--engine ray was given, but Ray is not installed here; expected it on this machine and on those of the "
            "cluster; install it: pip install 'kcache[ray]'"
        )
