"""The fast engine: a model's own weights, with the memory in a preallocated buffer and CUDA graphs.

A memory is placed at the head of a buffer, and the keys and values of a query are written behind it. Lengths are data
on the device, so one CUDA graph for each query length serves every memory. To read the engine, start with `model.py`
(the forward pass), then `layers.py` (one decoder layer), `attention/` (one kernel in each file), `kv_buffers.py` (where
keys and values are), `cuda_graphs.py` and `engine.py` (sequences and their buffers).
"""

from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.engine import Engine

__all__ = ["Engine", "HFGraphBackend"]
