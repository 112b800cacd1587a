"""The frozen networks: their files, the recipes of their tables, and images and captions on their way into rows.

- `repositories`, `weights`, `tokenizers`: where networks come from, and what their files hold, by content
- `recipes`: which tables there are, and what decides their bytes; needs no torch
- `decoding`, `side_data`, `color`: from the bytes of an image file to an upright RGB picture, whatever else is in them
- `fit`: whether what is asked for can fit into memory
- `pixels`, `pretrained`: what the networks see, and how they are loaded
- `frozen`: one image or caption in, the rows of one table out
- `online`: the same in the training loop, read like a cache
"""
