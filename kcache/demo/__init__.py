"""The embedded example: coloured handwritten digits, a tiny Kandinsky 2.2, and all that kcache does with them."""
