"""The things that a memory holds: a text memory, the tokens it becomes, and the cache built from it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import DynamicCache

from kvmem.cache.fingerprint import ModelFingerprint
from kvmem.errors import ArgumentError, check_kind, config_error

Message = dict[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""

Source = str | tuple[Message, ...]
"""What a memory was built from: a text, or earlier turns."""

REPR_CHARACTERS = 40
"""How much of an item's text its repr shows."""


class TextualMemoryItem(BaseModel):
    """A memory as text, before it becomes KV. Its fields are given by name."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(default_factory=lambda: str(uuid.uuid4()))
    memory: str
    metadata: dict[str, Any] = {}

    def __init__(self, *by_place: object, **fields: Any) -> None:
        """Raises ArgumentError for a field by place, one of another kind or name, and where the text is missing."""
        way_out = "Give TextualMemoryItem(memory=text), and id=... where an edit is to be told from another memory."
        if by_place:
            raise ArgumentError(f"A text memory takes its fields by name, not by place. {way_out}")
        try:
            super().__init__(**fields)
        except ValidationError as error:
            found = config_error(type(self).__name__, error, type(self).model_fields)
            raise ArgumentError(f"{found} {way_out}") from None


class MemoryTokens(BaseModel):
    """Which tokens a cache holds, and how to render its source again behind a new query.

    `token_ids` = header + body + trailer. The header is what the template puts before the memory, the body is the
    memory's own text, the trailer what the template puts behind it (up to the cut). `rest_ids` are the memory's last
    tokens where they are not stored, because a query could change them (`plain`). `lead_ids` belong to a merge: what
    stands between the header and the last body.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source
    template: str
    token_ids: tuple[int, ...]
    header_tokens: int
    body_end: int
    rest_ids: tuple[int, ...] = ()
    lead_ids: tuple[int, ...] = ()

    @property
    def header_ids(self) -> tuple[int, ...]:
        return self.token_ids[: self.header_tokens]

    @property
    def body_ids(self) -> tuple[int, ...]:
        return self.token_ids[self.header_tokens : self.body_end]


class TextualSource(BaseModel):
    """The text memory that an item came from, as it was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    metadata: dict[str, Any] = {}


class KVCacheMetadata(BaseModel):
    """All that is known of a stored cache but its tensors; a file's manifest holds one for each item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: MemoryTokens
    extracted_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    build_s: float
    kv_bytes: int
    fingerprint: ModelFingerprint | None
    """None: unverified. The file that it came from did not say which model built it (MemOS's pickles)."""
    textual_memory: TextualSource | None = None
    lossy: str = Field(default="", exclude_if=lambda mark: not mark)
    """What the keys and values have been compressed to on their way, or their base's ("int8"); "" is: nothing was lost.
    A file says so only where there is something to say, and a kvmem that does not know the word refuses that file."""

    @property
    def token_count(self) -> int:
        return len(self.tokens.token_ids)

    @property
    def source_text(self) -> str:
        source = self.tokens.source
        return source if isinstance(source, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in source)


@dataclass(eq=False, repr=False)
class KVCacheItem:
    """A memory as KV: `kv_cache` holds keys (after RoPE) and values of shape (1, kv_heads, tokens, head_dim) a layer.

    The tensors are shared by every cache lent from this item, and are never written again.
    """

    kv_cache: DynamicCache
    metadata: KVCacheMetadata
    kv_cache_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __post_init__(self) -> None:
        """Raises ArgumentError for a part of another kind."""
        check_kind("An item's kv_cache", self.kv_cache, DynamicCache, way_out="KVCacheMemory.extract makes items.")
        check_kind("An item's metadata", self.metadata, KVCacheMetadata, way_out="KVCacheMemory.extract makes items.")
        check_kind("An item's kv_cache_id", self.kv_cache_id, str)

    def __repr__(self) -> str:
        """In one line: a list of items is looked at, and a thousand token ids would hide what they are."""
        known, text = self.metadata, self.metadata.source_text
        begins = text if len(text) <= REPR_CHARACTERS else text[: REPR_CHARACTERS - 1] + "…"
        held = f"{known.token_count} tokens, {known.kv_bytes / 1e6:.1f} MB"
        return f"KVCacheItem({self.kv_cache_id!r}, {held}, {begins!r})"
