"""The demo of filling holes: digits repainted in the middle of their paper.

- `run`: what is trained and drawn, and what it came to
- `exam`: the pictures with holes, what is asked for in them, and how it is judged
- `picture`: both ways of filling side by side
"""
