"""Models: loading them by name, random weights of a published shape, and the forward pass.

`load` finds a model on a hub, in a folder or in the packaged copy of SmolLM2, or makes random weights of a shape in
`shapes/`. `prefill` and `decode_one_token` are the two steps of generation. `layout_of` says what the layers of
a model keep of a memory, and how many bytes that takes. The module `loading` is also used as a
namespace: `loading.load(...)`, `loading.shapes()`.
"""

from kvmem.models import loading
from kvmem.models.forward import decode_one_token, prefill
from kvmem.models.loading import Loaded, load, shape_config, shapes
from kvmem.models.probes import continues_in_one_step, layout_of, measured_layout
from kvmem.models.random_weights import STD
from kvmem.models.structure import NO_MAXIMUM, decoder_layers, decoder_of, max_positions

__all__ = [
    "NO_MAXIMUM",
    "STD",
    "Loaded",
    "continues_in_one_step",
    "decode_one_token",
    "decoder_layers",
    "decoder_of",
    "layout_of",
    "load",
    "loading",
    "max_positions",
    "measured_layout",
    "prefill",
    "shape_config",
    "shapes",
]
