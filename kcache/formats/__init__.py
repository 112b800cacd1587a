"""The forms of a shard on disk."""
