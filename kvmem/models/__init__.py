"""Models: loading them by name, random weights of a published shape, and the forward pass.

`load` finds a model on a hub, in a folder or in the packaged copy of SmolLM2, or makes random weights of a shape in
`shapes/`. `prefill` and `decode_one_token` are the two steps of generation. The module `loading` is also used as a
namespace: `loading.load(...)`, `loading.shapes()`.
"""

from kvmem.models import loading
from kvmem.models.forward import decode_one_token, prefill
from kvmem.models.loading import Loaded, load, shape_config, shapes
from kvmem.models.random_weights import STD
from kvmem.models.structure import NO_MAXIMUM, decoder_layers, max_positions

__all__ = [
    "NO_MAXIMUM",
    "STD",
    "Loaded",
    "decode_one_token",
    "decoder_layers",
    "load",
    "loading",
    "max_positions",
    "prefill",
    "shape_config",
    "shapes",
]
