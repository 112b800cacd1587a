"""The demo of filling holes: digits repainted in the middle of their paper.

- `run`: what is trained and drawn, and what it came to
- `papers`: bare and half tinted paper, and the pictures to train on
- `exam`: the pictures with holes, and what is asked for in them
- `judging`, `kept`: how the holes were filled, and what became of what is around them
- `picture`: both ways of filling side by side
"""
