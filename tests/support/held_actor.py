"""Actors that stop in the middle of a shard for as long as a file is there, so that tests can take them away."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kcache.engines.actor import EncodingActor
from kcache.engines.copier import CopyingActor, CopyTask
from kcache.engines.tasks import Look

SHAPED: dict[str, Any] = {
    "resolution": (32, 64), "aspect_ratio_buckets": "auto", "flip": True, "rows_per_shard": 2,
}  # fmt: skip
"""Settings of their builds, beside those of `small_config`: mirror images, two resolutions, several shapes."""


def wait_at(cache: Path, stopped: Callable[[], bool]) -> None:
    """Wait while `CACHE.hold` exists, unless `stopped`, and say so by a file `CACHE.held/PID`."""
    hold = Path(f"{cache}.hold")
    if hold.exists():
        held = Path(f"{cache}.held")
        held.mkdir(exist_ok=True)
        (held / str(os.getpid())).touch()
        while hold.exists() and not stopped():
            time.sleep(0.02)


class HeldActor(EncodingActor):
    """Waits at a batch."""

    def _count(self, inputs: int) -> None:
        wait_at(Path(self._setup.cache), lambda: self._stopped)
        super()._count(inputs)


class HeldCopier(CopyingActor):
    """Waits before it copies."""

    def build(self, task: CopyTask) -> Look:
        wait_at(Path(self._setup.plan).parents[1], lambda: self._stopped)
        return super().build(task)


def build_held(source: str, cache: str, oracle: str, address: str) -> None:
    """Build a small cache by such actors: the command of a process of its own."""
    from small_builds import small_config

    import kcache.engines.ray_builder
    from kcache.build.build import build_cache
    from kcache.engines import engine_of

    kcache.engines.ray_builder.EncodingActor = HeldActor  # type: ignore[misc]
    config = small_config(Path(oracle), **SHAPED, engine="ray", address=address)
    build_cache(source, cache, config, engine=engine_of(source, config))
