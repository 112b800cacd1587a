"""What moves the weights.

- `learning`: the parameters that learn
- `libraries`: which optimizer, of which library, and what its state takes
- `one_by_one`: one parameter moved at a time: bfloat16 rounded stochastically, gradients freed, states on the host
- `schedule`: the learning rate by step
- `kept`: an optimizer's state as named tensors
- `average`: the moving average of where the weights have been
"""
