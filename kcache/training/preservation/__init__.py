"""Class rows: what the prior drew of its class prompts before it was trained, which joins every batch.

- `rows`: what they are, in memory and in a file, and which go beside which samples
- `drawing`: drawn once, and found again by what decides them
"""
