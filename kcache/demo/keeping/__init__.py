"""The demo of prior preservation: a new style learnt from twenty pictures, and what becomes of all others.

- `run`: what is trained and drawn, and what it came to
- `exam`: the new style, what is asked for before and after, and how it is judged
- `picture`: what each prior has drawn, below each other
"""
