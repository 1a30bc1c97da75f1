"""A memory in its three forms: as text, as tokens, and as the cache built from them."""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from transformers import DynamicCache

from kvmem.cache.fingerprint import ModelFingerprint
from kvmem.cache.plain_values import text_fault, value_fault
from kvmem.errors import ArgumentError, check_kind, config_error

Message = dict[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""

Source = str | tuple[Message, ...]
"""What a memory is built from: a text, or earlier chat turns."""

REPR_CHARACTERS = 40
"""How many characters of an item's text its repr shows."""


class TextualMemoryItem(BaseModel):
    """A memory as text. Its fields are keyword arguments.

    metadata: plain JSON values (dict with str keys, list, str, int, finite float, bool, None), because files keep it.
    """

    model_config = ConfigDict(extra="forbid")

    id: str = Field(default_factory=lambda: str(uuid.uuid4()))
    memory: str
    metadata: dict[str, Any] = {}

    def __init__(self, *positional: object, **fields: Any) -> None:
        """Raises ArgumentError for a positional, unknown, missing or wrongly typed field."""
        way_out = "Give TextualMemoryItem(memory=text), with id=... if an edited text shall replace the earlier one."
        if positional:
            raise ArgumentError(f"A text memory takes its fields by name, not by position. {way_out}")
        try:
            super().__init__(**fields)
        except ValidationError as error:
            found = config_error(type(self).__name__, error, type(self).model_fields)
            raise ArgumentError(f"{found} {way_out}") from None

    @field_validator("id", "memory")
    @classmethod
    def _is_unicode(cls, text: str) -> str:
        fault = text_fault(text)
        if fault:
            raise ValueError(f"it {fault}. Decode the text with errors='replace'.")
        return text

    @field_validator("metadata")
    @classmethod
    def _is_json(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        fault = value_fault(metadata)
        if fault:
            raise ValueError(f"metadata{fault}, which a file can't keep. Convert it to plain JSON values.")
        return metadata

    def checked(self) -> Self:
        """A copy that shares nothing with this one, checked as a new one is, because fields can be assigned.

        Raises ArgumentError.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        checked = type(self)(**fields)
        checked.metadata = copy.deepcopy(checked.metadata)
        return checked


class DialogueMemoryItem(TextualMemoryItem):
    """Earlier turns of a conversation as a memory: `memory` is a list of turns, each {"role": text, "content": text}.

    The same conversation with more turns is the same memory, grown, and not another text.
    """

    memory: tuple[Message, ...]  # type: ignore[assignment] # a memory of turns where the others have a text

    @field_validator("id", "memory")
    @classmethod
    def _is_unicode(cls, value: str | tuple[Message, ...]) -> str | tuple[Message, ...]:  # type: ignore[override]
        if isinstance(value, str):
            return super()._is_unicode(value)
        if not value:
            raise ValueError("it has no turns. Give at least one.")
        for turn in value:
            if set(turn) != {"role", "content"}:
                raise ValueError(f'a turn is {{"role": a text, "content": a text}}, and got {turn!r}.')
            for text in turn.values():
                super()._is_unicode(text)
        return value


class MemoryTokens(BaseModel):
    """The tokens of a cache, and what is needed to render its source again with a new query.

    `token_ids` = header + body + trailer. The header is what the template puts before the memory, the body is the
    memory's own text, and the trailer is what the template puts after it, up to the cut. `header_tokens` and `body_end`
    are indices into `token_ids`. `rest_ids` are the last tokens of the memory if they are not stored because a query
    could change them (template `plain`). `lead_ids` are set in a merge: the tokens between header and last body.
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
    """Id and metadata of the text memory that an item was built from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    metadata: dict[str, Any] = {}


class Compaction(BaseModel):
    """How a memory was compacted: the strategy with its knobs, and how many entries each layer and KV head keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str
    knobs: dict[str, Any] = {}
    entries: tuple[tuple[int, ...], ...]
    """By layer, for each KV head."""
    has_bias: bool = False
    """Whether each entry has a number that is added to its scores."""

    def share(self, tokens: int) -> float:
        """Entries over those of the text as it was built."""
        return sum(map(sum, self.entries)) / (tokens * sum(map(len, self.entries)))


class KVCacheMetadata(BaseModel):
    """Everything about a stored cache except its tensors. A file's manifest holds one for each item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: MemoryTokens
    extracted_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    build_s: float
    kv_bytes: int = Field(ge=0)
    fingerprint: ModelFingerprint | None
    """None if unverified: the file did not say which model built the cache (MemOS's pickles)."""
    textual_memory: TextualSource | None = None
    lossy: str = Field(default="", exclude_if=lambda mark: not mark)
    """The lossy forms that the keys and values, or those of their base, went through ("int8"); "" if none.

    It is written to a file only if it is set. An older version of kvmem refuses a file that has it.
    """
    namespace: str = Field(default="", exclude_if=lambda name: not name)
    """The namespace of the memory that the item belongs to; "" for the default one. In a file as `lossy`."""

    compaction: Compaction | None = Field(default=None, exclude_if=lambda compaction: compaction is None)
    """How the memory was compacted; None if it has an entry for each token. In a file as `lossy`."""

    @property
    def token_count(self) -> int:
        return len(self.tokens.token_ids)

    @property
    def source_text(self) -> str:
        source = self.tokens.source
        return source if isinstance(source, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in source)


@dataclass(eq=False, repr=False)
class KVCacheItem:
    """A memory as KV. `kv_cache` holds, for each layer, keys (after RoPE) and values, (1, kv_heads, tokens, head_dim).

    Of a compacted memory it holds packed entries: see `kvmem.cache.compacted_layers`. Every view of this item shares
    the tensors. They are never written again.
    """

    kv_cache: DynamicCache
    metadata: KVCacheMetadata
    kv_cache_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __post_init__(self) -> None:
        """Raises ArgumentError if a field has another type."""
        check_kind("An item's kv_cache", self.kv_cache, DynamicCache, way_out="KVCacheMemory.extract makes items.")
        check_kind("An item's metadata", self.metadata, KVCacheMetadata, way_out="KVCacheMemory.extract makes items.")
        check_kind("An item's kv_cache_id", self.kv_cache_id, str)
        fault = text_fault(self.kv_cache_id)
        if fault:
            raise ArgumentError(f"An item's kv_cache_id {fault}. Give another one.")

    def __repr__(self) -> str:
        """One line without token ids, so that a list of items stays readable."""
        known, text = self.metadata, self.metadata.source_text
        excerpt = text if len(text) <= REPR_CHARACTERS else text[: REPR_CHARACTERS - 1] + "…"
        size = f"{known.token_count} tokens, {known.kv_bytes / 1e6:.1f} MB"
        return f"KVCacheItem({self.kv_cache_id!r}, {size}, {excerpt!r})"
