"""The network that learns.

- `objective`: loaded as a run's settings want it, with what it is to learn
- `decoder`: which decoder a run can begin with, and what is widened
- `limits`: what does not fit in memory, and which settings take less
- `saved`: written down, and what it was trained on named
"""
