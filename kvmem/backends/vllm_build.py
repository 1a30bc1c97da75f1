"""What a build through our connector announces beforehand, and what it must have come to."""

from __future__ import annotations

import uuid
from typing import Any

from kvmem.fingerprint import ModelFingerprint
from kvmem.items import KVCacheMetadata, MemoryTokens, TextualMemoryItem, TextualSource
from kvmem.storage.manifest import ItemManifest

BUILD_TOKENS = 2
"""A build generates two tokens, for a failed save is known one step after the prompt's last."""


def announced(
    tokens: MemoryTokens, fingerprint: ModelFingerprint, textual_memory: TextualMemoryItem | None
) -> ItemManifest:
    """What the saved file says of itself; how long the build took is not known yet."""
    count = len(tokens.token_ids)
    source = None
    if textual_memory is not None:
        source = TextualSource(id=textual_memory.id, metadata=textual_memory.metadata)
    metadata = KVCacheMetadata(
        tokens=tokens, build_s=0.0, kv_bytes=fingerprint.kv_bytes(count), fingerprint=fingerprint,
        textual_memory=source,
    )  # fmt: skip
    return ItemManifest(
        kv_cache_id=str(uuid.uuid4()), cache_tokens=count, layers=fingerprint.layers, metadata=metadata
    )


def not_saved(report: dict[str, Any], may_recompute: bool) -> str:
    """The connector's reason, if the file was not saved or its base was not loaded; else nothing."""
    return str(report["save_error"] or (not may_recompute and report["load_error"]) or "")
