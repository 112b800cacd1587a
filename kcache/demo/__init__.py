"""The embedded example: coloured handwritten digits, a tiny Kandinsky 2.2, and all that kcache does with them.

- `digits`, `tiny`: the pictures and the networks
- `run`, `folder`, `stages`: the whole demo, where it lies, and its training runs
- `exam`, `scoring`: what it learnt, drawn and judged
- `shapes`, `placing`: the demo of lying and standing paper, and where on it a digit stands
- `holes`: the demo of pictures with holes, and of filling them
- `keeping`: the demo of prior preservation
- `result`, `picture`, `report`: what was measured, in pictures and as a page
"""
