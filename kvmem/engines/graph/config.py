"""The configuration of the fast engine."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.engines.graph.model import Compile


@dataclass(config=ConfigDict(extra="forbid", protected_namespaces=()))
class GraphConfig:
    """Sizes are in tokens. On a CPU there are no graphs, and `auto` neither compiles nor pads."""

    attention: str = "auto"
    """The attention kernel: fa3, torch_flash, sdpa, …; auto: the fastest that runs here."""
    capacity_tokens: int = Field(default=8192, ge=1)
    """The longest memory, query and answer together: the size of each buffer."""
    buffers: int = Field(default=2, ge=1)
    """Memories in place at once. A buffer is allocated when first needed; the least recently used one is reused."""
    compile: Compile = "auto"
    """How layers are compiled: none, once for all_lengths, or once for each_length (5 s each); auto: all_lengths."""
    fused: bool | None = None
    """Uses our own Triton kernels to write heads to the buffer and to decode; None: where Triton runs."""
    graph_up_to: int = Field(default=1024, ge=0)
    """Prefills of at most this many new tokens run as CUDA graphs, captured at first use; 0: no graphs at all."""
    graphs: int = Field(default=64, ge=1)
    """The number of graphs kept; the least recently used one is dropped."""
    pad_to: int | None = Field(default=None, ge=1)
    """Prefills are padded to a multiple of this, which is faster for short ones; None: 8, and 1 on a CPU."""
    pad_up_to: int = Field(default=512, ge=0)
    """Longer prefills are not padded."""
    warm_tokens: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Prefills of these lengths are compiled and captured when the model is opened, not at first use."""
