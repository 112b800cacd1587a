"""Rows that come from files or a bucket just before they are used, a few windows of an order at a time.

- `streamed`: the order for caches that are read in blocks, any window of it known alone
- `beside`: orders of several shapes side by side, a stage for each
- `stage`: rows of a few windows in memory, fetched in order of first use
- `fetches`: which ranges of files hold the rows of a run of samples
- `ration`: how much memory a stage takes
- `slots`: what it is made of
- `ranges`: ranges of files of a disk or of a bucket, many at a time
"""
