"""Source × encoders → store: what is missing is found, planned, encoded, and made a cache.

- `build`: the whole course, round by round, until nothing is missing
- `survey`: what the source offers, which tables are wanted, what is missing
- `committed`, `departures`: what is there, and which samples would leave
- `plan`: what is missing, cut into numbered shards
- `claims`, `builder`: who of several writes which shard; one of them at work
- `encode`: decode, encode and write at the same time
- `joined_tars`: rows written into tars of whole samples
- `finish`, `dataset_card`: from committed shards to a finished cache
- `estimate`: what all of it would take
"""

from kcache.build.build import BuildResult, build_cache
from kcache.build.work.progress import BuildProgress

__all__ = ["BuildProgress", "BuildResult", "build_cache"]
