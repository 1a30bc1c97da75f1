"""Memories that stay in the engine's prefix cache, whatever other requests evict."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable

from kvmem.cache import KVCacheItem
from kvmem.engines.vllm.connector import LOAD, PIN
from kvmem.engines.vllm.engine_loop import EngineLoop, answer_of
from kvmem.engines.vllm.memory_files import FileStore, block_salt, tenant_of
from kvmem.engines.vllm.requests import EngineRequest
from kvmem.errors import EngineError, UnknownMemoryError


class Pins:
    """The pinned memories of one engine. An item has one pin for each salt, as only requests of one salt share blocks.

    The engine releases a pin with the next request that it is sent.
    """

    def __init__(self, loop: EngineLoop, store: FileStore, check_length: Callable[[int, int], None]) -> None:
        self.loop = loop
        self.store = store
        self.check_length = check_length
        self.names: weakref.WeakKeyDictionary[KVCacheItem, dict[str | None, str]] = weakref.WeakKeyDictionary()
        """For each pinned item, the names of its pins by salt."""

    def pin(self, item: KVCacheItem | str, cache_salt: str | None = None) -> int:
        """Keeps an item (or the item of a kv_cache_id) in the prefix cache until it is unpinned or deleted.

        cache_salt: only requests of this salt share the blocks.
        Returns how many of its tokens are pinned: whole blocks. The rest is injected from its file as before.
        Raises EngineError if the engine has too few blocks, and UnknownMemoryError for an unknown kv_cache_id.
        """
        item = self._known(item)
        cache_view = self.store.view(item)
        assert cache_view.file is not None  # a store's view always has one
        self.check_length(len(cache_view.tokens.token_ids), 1)
        salt = block_salt(tenant_of(cache_salt, cache_view), cache_view)
        with self.loop.lock:
            pinned = self.names.get(item, {})
            name = pinned.get(salt) or uuid.uuid4().hex
            transfer = {LOAD: cache_view.file.name, PIN: name}
            request = EngineRequest(cache_view.tokens.token_ids, 1, salt=salt, transfer=transfer, past_end=True)
            (output,) = self.loop.run([request])
            report = answer_of(output).report
            assert report is not None  # the request gave the connector an order
            if report.load_error or report.pin_error:
                raise EngineError(f"{item.kv_cache_id} is not pinned: {report.load_error or report.pin_error}")
            if salt not in pinned:
                self.names.setdefault(item, {})[salt] = name
                weakref.finalize(item, self.loop.pins_to_release.append, name)
        return report.pinned_tokens

    def unpin(self, item: KVCacheItem | str) -> None:
        """Lets the engine evict an item again, under every salt. Raises EngineError if it is not pinned."""
        with self.loop.lock:
            item = self._known(item)
            if item not in self.names:
                pinned = ", ".join(self.pinned_ids()) or "nothing"
                raise EngineError(f"{item.kv_cache_id} is not pinned. Pinned: {pinned}.")
            self.loop.pins_to_release += self.names.pop(item).values()

    def unpin_all(self) -> None:
        for item in list(self.names):
            self.unpin(item)

    def pinned_ids(self) -> list[str]:
        """The kv_cache_ids of all pinned items."""
        return sorted(item.kv_cache_id for item in self.names)

    def _known(self, item: KVCacheItem | str) -> KVCacheItem:
        """The item itself, or the one of this kv_cache_id that has a file here. Raises UnknownMemoryError."""
        if isinstance(item, KVCacheItem):
            return item
        for candidate in list(self.store.files):
            if candidate.kv_cache_id == item:
                return candidate
        raise UnknownMemoryError(f"No memory {item!r} has a file in this engine. Give the KVCacheItem itself.")
