"""What is done on disks, so that it is whole, durable and known to others, on any file system.

- `filesystems`: what some file systems cannot do, gone without
- `durable`: files and folders that appear whole or not at all, and holding a folder
- `leases`, `readers`: what processes elsewhere hold, and who reads
- `memo`: digests of files, remembered while these stay unchanged
- `pieces`: files that somebody else may digest for a memo
- `scratch`: what need not fit into memory
- `fetched`: records of buckets, kept here while they stay unchanged
- `sweeping`: folders kept to save time, until they are too many
- `room`: what a folder must be able to take, found out and kept back before it is needed
"""
