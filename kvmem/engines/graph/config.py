"""What the fast engine can be told."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.engines.graph.model import Compile


@dataclass(config=ConfigDict(extra="forbid", protected_namespaces=()))
class GraphConfig:
    """Sizes in tokens. On a CPU there are no graphs, and `auto` neither compiles nor pads."""

    attention: str = "auto"
    """The attention kernel: fa3, torch_flash, sdpa, …; auto: the fastest that runs here."""
    capacity_tokens: int = Field(default=8192, ge=1)
    """The longest memory, query and answer together; each buffer has room for as much."""
    buffers: int = Field(default=2, ge=1)
    """Memories in place at once. A buffer is made when it is first needed, and the one used longest ago gives way."""
    compile: Compile = "auto"
    """A layer is compiled: none, once for all_lengths, or once for each_length (5 s a length); auto: all_lengths."""
    fused: bool | None = None
    """Heads are placed, and a token is decoded, by Triton kernels of our own; None: where Triton runs."""
    graph_up_to: int = Field(default=1024, ge=0)
    """Prefills of at most so many new tokens run as CUDA graphs, captured at first use; 0: none, nor decoding."""
    graphs: int = Field(default=64, ge=1)
    """So many graphs are kept; the one used longest ago gives way."""
    pad_to: int | None = Field(default=None, ge=1)
    """Prefills are padded to a multiple of this, which is faster up to some length; None: 8, and 1 on a CPU."""
    pad_up_to: int = Field(default=512, ge=0)
    """Longer prefills are not padded."""
    warm_tokens: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Prefills of these lengths are compiled and captured while the model is opened, and not at first use."""
