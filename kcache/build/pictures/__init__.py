"""Pictures as a build sees them: what they are cropped to, how large they are, and where their bytes come from.

- `asked`: which shapes a build was asked for, beside those that the cache has
- `sizes`: width and height of pictures, before and after they are decoded
- `remembered`: sizes that this machine has read before
- `contents`: from a key to what it names, in the source
"""
