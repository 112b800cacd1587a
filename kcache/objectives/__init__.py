"""Batch → loss, for each thing that can be learnt. Knows no file of a cache.

- `losses`: the objectives, and what the training loop asks each of them
- `errors`: how much the error of each draw of noise counts
- `inpainting`, `hinting`: the decoders that fill holes, and that follow a hint
- `widening`: such decoders made of a plain one
- `preservation`: the prior beside what it drew before
- `packing`, `packed_attention`: the prior over the tokens that there are
- `lora`, `lora_file`: adapters beside a network's own weights, and the file that they are kept in
- `blocks`: a network's blocks recomputed, compiled, or with another attention
"""

from kcache.objectives.hinting import HintObjective
from kcache.objectives.inpainting import InpaintObjective
from kcache.objectives.losses import DecoderObjective, Objective, PriorObjective

__all__ = ["DecoderObjective", "HintObjective", "InpaintObjective", "Objective", "PriorObjective"]
