"""What pictures are drawn with, and how large.

- `halves`: the networks of a run or a repository
- `sizes`: the height and width, by what was trained on
"""
