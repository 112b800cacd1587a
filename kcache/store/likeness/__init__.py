"""What CLIP's embeddings in a cache say of its samples: cosines, of rows that are there.

- `cosines`: rows at length 1, and how fitting each sample's captions are
- `clusters`: rows divided into groups around some of them
- `duplicates`: pictures that are nearly the same as another one
- `known`: what was computed of all samples, kept for as long as the cache stays the same
- `listing`: near-duplicates by name, and the file that lists them
- `columns`: all that an expression may name of some samples
"""
