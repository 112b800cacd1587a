"""kcache: run Kandinsky 2.2's frozen encoders once, then train the prior and the decoder from their cached outputs."""

from kcache.store.cache import Cache

__all__ = ["Cache", "__version__"]

__version__ = "0.1.0"
