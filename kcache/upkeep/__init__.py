"""Looking after a finished cache.

- `info`: what is in it
- `records`: what its small files say, each checked against what vouches for it
- `scan`: one large file read once, against its rows' checksums
- `verify`: all of both
- `compare`: its rows beside what its encoders give now
- `repair`: broken rows encoded again
- `portions`: shards cut out of it, to be copied by whoever has a hand free
- `copying`, `convert`, `merge`: other caches made of it
- `united`: which samples one of several has
- `garbage`: what is no part of it any more
"""

from kcache.upkeep.convert import convert_cache
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.info import describe_cache
from kcache.upkeep.merge import merge_caches
from kcache.upkeep.repair import repair_cache
from kcache.upkeep.verify import verify_cache

__all__ = ["collect_garbage", "convert_cache", "describe_cache", "merge_caches", "repair_cache", "verify_cache"]
