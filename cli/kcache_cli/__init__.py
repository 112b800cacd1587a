"""The `kcache` command: reads flags, makes one call into the library, prints what came back."""
