"""What a scheduler gives a vLLM engine to answer with: a file to inject, and what it wants to hear of the answer."""

from __future__ import annotations

from collections.abc import Callable

from kvmem.cache import KeptPrefix, MemoryTokens
from kvmem.engines.base import FileHandle


class FileView(FileHandle):
    """As a CacheView, for an engine that injects files. It is of one answer, and its attributes are set on it."""

    note: str = ""
    """Why a stored memory is not part of the view, as a sentence; "" if every memory is."""
    lossy: str = ""
    """The lossy forms that the keys and values went through; "" if they are as built."""
    tier: str = ""
    """Where the file was; "" if nothing is injected."""
    keep: MemoryTokens | None = None
    kept: KeptPrefix | None = None
    """Nothing is kept of what an answer computed: a save within an answer would delay its first token."""
    on_prefill: Callable[[int, int, float], None] | None = None
    """If set, called after an answer with the prompt's tokens that it computed, its cached tokens before them, and the
    seconds until the first token."""

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
