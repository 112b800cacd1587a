"""Which engine a build, or a conversion, was asked for: this process, or the machines of a Ray cluster."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

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


def copying_engine(
    engine: Literal["local", "ray"], address: str | None = None, worker: str | None = None
) -> Callable[..., Any] | None:
    """What copies the shards of a conversion, None being its own process; raises ConfigError.

    It is given to `convert_cache` as its `engine`; `address` and `worker` are what is said beside it.
    """
    # Settings of a build, which has the same three and says what is wrong with them.
    BuildConfig(engine=engine, address=address, worker=worker)
    if engine == "local":
        return None
    _check_ray()
    from kcache.engines.ray_copier import copying

    return partial(copying, address=address)


def _check_ray() -> None:
    if find_spec("ray") is None:
        raise ConfigError(
            "--engine ray was given, but Ray is not installed here; expected it on this machine and on those of the "
            "cluster; install it: pip install 'kcache[ray]'"
        )
