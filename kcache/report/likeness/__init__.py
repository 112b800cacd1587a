"""What CLIP's embeddings say of a cache, to look at; what they say is computed by `kcache.store.likeness`.

- `sections`: the captions that fit best and least, and pictures of each kind
"""
