"""Where caches lie: on a disk or in an object store, behind pathlib's names and a few effects with two forms.

- `place`: a path of this machine, or one in a bucket
- `bucket`: paths in a bucket: what of pathlib caches read by
- `client`: the connection to a store, once per process, and what its errors mean
- `conditional`: files of a bucket that are created once, or changed only from what was read
- `ranges`: ranges of files of a disk or of a bucket, many at a time
- `effects`: reading many files, creating, swapping, publishing, removing: of a disk and of a bucket
"""

from kcache.places.place import Place, place_of

__all__ = ["Place", "place_of"]
