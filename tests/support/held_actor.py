"""Actors that stop in the middle of a shard for as long as a file is there, so that tests can take them away."""

import os
import time
from pathlib import Path

from kcache.engines.actor import EncodingActor


class HeldActor(EncodingActor):
    """Waits at a batch while `CACHE.hold` exists, and says so by a file `CACHE.held/PID`."""

    def _count(self, inputs: int) -> None:
        hold = Path(f"{self._setup.cache}.hold")
        if hold.exists():
            held = Path(f"{self._setup.cache}.held")
            held.mkdir(exist_ok=True)
            (held / str(os.getpid())).touch()
            while hold.exists() and not self._stopped:
                time.sleep(0.02)
        super()._count(inputs)


def build_held(source: str, cache: str, oracle: str, address: str) -> None:
    """Build a small cache by such actors: the command of a process of its own."""
    from small_builds import small_config

    import kcache.engines.crew
    from kcache.build.build import build_cache
    from kcache.engines import engine_of

    kcache.engines.crew.EncodingActor = HeldActor  # type: ignore[misc]
    config = small_config(Path(oracle), rows_per_shard=2, engine="ray", address=address)
    build_cache(source, cache, config, engine=engine_of(source, config))
