"""Where caches lie: on a disk or in an object store, behind pathlib's names and a few effects with two forms.

- `place`: a path of this machine, or one in a bucket
- `bucket`: paths in a bucket: what of pathlib caches read by
- `hub`: what lies in a dataset of the Hugging Face Hub, fetched to this machine and only read
- `client`: the connection to a store, once per process, and what its errors mean
- `conditional`: files of a bucket that are created once, or changed only from what was read
- `fetching`: much of a bucket read at once: spans that lie near together, many requests in flight
- `opened`: a file of either form, open for libraries that want one
- `effects`: reading many files, creating, swapping, publishing, removing: of a disk and of a bucket
- `inventory`: how large and how old things are that are to be cleared up
- `holds`: who reads and writes a folder, which only a disk knows
- `leases`: how long claims in a folder of either form last, and how they change hands
"""

from kcache.places.place import Place, cache_place, place_of

__all__ = ["Place", "cache_place", "place_of"]
