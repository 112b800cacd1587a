"""Batch → loss, for each thing that can be learnt. Knows no file of a cache.

- `losses`: the objectives, and what the training loop asks each of them
- `packing`, `packed_attention`: the prior over the tokens that there are
- `lora`: adapters beside a network's own weights
- `blocks`: a network's blocks recomputed, compiled, or with another attention
"""

from kcache.objectives.losses import DecoderObjective, Objective, PriorObjective

__all__ = ["DecoderObjective", "Objective", "PriorObjective"]
