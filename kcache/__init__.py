"""kcache: run Kandinsky 2.2's frozen encoders once, then train the prior and the decoder from their cached outputs.

`store` and `sources`, `encoders` and `build`, `upkeep` make and keep caches; `objectives`, `loader` and `training`
learn from them; `report` and `demo` show it. All stand on the words (`config`, `errors`, `urls`, `settings`, `tally`)
and on the ground (`places`, `disk`, `decoration`, `foreign`, `hints`, `machine`, `plainly`, `processes`, `stopping`).
"""

from kcache.store.cache import Cache

__all__ = ["Cache", "__version__"]

__version__ = "0.1.0"
