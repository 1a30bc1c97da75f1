"""An answer, as every engine of this process gives it."""

from __future__ import annotations

from dataclasses import dataclass

from kvmem.dynamic_cache import LentCache
from kvmem.prompt import TokenizedPrompt


@dataclass(frozen=True)
class Generation:
    """An answer: its text and tokens (without the end token), and how many prompt tokens came from the cache."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    note: str = ""
    """Why a memory that is stored was prefilled all the same (a scheduler's answer); "" if there is nothing to tell."""
    lossy: str = ""
    """What the memory's keys and values had been compressed to ("int8"); "": they were the bits that were built."""


def told_of(prompt: TokenizedPrompt, kv_cache: LentCache | None) -> dict[str, str]:
    """What an answer says of the cache that it came from."""
    if kv_cache is None:
        return {}
    return {"note": kv_cache.note, "lossy": kv_cache.lossy if prompt.memory_ids else ""}
