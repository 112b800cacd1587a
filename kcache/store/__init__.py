"""How caches and runs lie on disk, and reading a cache. Needs no torch.

- `recipe`: what decides the bytes of a table
- `digests`: the names of contents
- `shards`: a run of rows, which exists when its commit record does; its form is one of `formats`
- `samples`, `index`, `manifest`: who the samples are, where their rows stand, and what makes a folder a cache;
  `shaped` says which tables have rows of which samples
- `recorded`: the settings behind a manifest, and the command that adds to a cache
- `rows`, `cache`, `selection`: opening it, reading rows, choosing samples
- `run_directory`, `checkpoint`: what a training run leaves
"""

from kcache.store.cache import Cache
from kcache.store.manifest import Manifest, read_manifest
from kcache.store.recipe import Field, Recipe

__all__ = ["Cache", "Field", "Manifest", "Recipe", "read_manifest"]
