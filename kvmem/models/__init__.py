"""Models: loading them by name, random weights of a published shape, and the forward pass.

`loading` finds a model on a hub, in a folder, in the packaged copy of SmolLM2, or makes random weights of a shape in
`shapes/`. `forward` has the two steps of generation, `prefill` and `decode_one_token`.
"""

from kvmem.models.forward import decode_one_token, prefill
from kvmem.models.random_weights import STD

__all__ = ["STD", "decode_one_token", "prefill"]
