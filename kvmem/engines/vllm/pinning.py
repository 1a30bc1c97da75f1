"""Which memories an engine keeps in its prefix cache whatever else runs."""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvmem.cache import KVCacheItem
from kvmem.engines.vllm import launch
from kvmem.engines.vllm.connector import LOAD, PIN, REPORT, UNPIN
from kvmem.engines.vllm.launch import Request
from kvmem.engines.vllm.memory_files import FileStore, salt_of
from kvmem.errors import EngineError, PromptError, UnknownMemoryError

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


@dataclass(frozen=True)
class Pin:
    """One memory under one salt, for only requests of the same salt share blocks."""

    name: str
    salt: str | None


class Pins:
    """What is pinned, and what the engine has yet to be told to let go: that rides with the next request."""

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[KVCacheItem, list[Pin]] = weakref.WeakKeyDictionary()
        self.to_let_go: list[str] = []

    def name(self, item: KVCacheItem, salt: str | None) -> str:
        """The name of a pin that is there, or a new one."""
        known = [pin.name for pin in self.of.get(item, []) if pin.salt == salt]
        return known[0] if known else uuid.uuid4().hex

    def add(self, item: KVCacheItem, pin: Pin) -> None:
        """A pin that the engine holds; it goes with its item, if nobody lets it go before."""
        self.of[item] = [kept for kept in self.of.get(item, []) if kept.name != pin.name] + [pin]
        weakref.finalize(item, self.to_let_go.append, pin.name)

    def drop(self, item: KVCacheItem) -> None:
        """Raises EngineError, naming what is pinned, for an item that is not."""
        if item not in self.of:
            raise EngineError(f"{item.kv_cache_id} is not pinned. Pinned: {self.named() or 'nothing'}.")
        self.to_let_go += [pin.name for pin in self.of.pop(item)]

    def drop_all(self) -> None:
        for item in list(self.of):
            self.drop(item)

    def named(self) -> str:
        """The ids of what is pinned."""
        return ", ".join(sorted(item.kv_cache_id for item in self.of))

    def with_unpins(self, requests: Sequence[Request]) -> list[Request]:
        """`requests`, the first of which tells the engine what to let go."""
        if not requests or not self.to_let_go:
            return list(requests)
        names = [self.to_let_go.pop() for _ in range(len(self.to_let_go))]
        first = replace(requests[0], transfer={**requests[0].transfer, UNPIN: names})
        return [first, *requests[1:]]


class PinningEngine:
    """The part of VLLMBackend that runs requests and keeps memories in the engine's own prefix cache."""

    llm: LLM
    store: FileStore
    pins: Pins
    lock: threading.RLock
    window: int

    def pin(self, item: KVCacheItem | str, cache_salt: str | None = None) -> int:
        """Keeps an item (or its kv_cache_id) in the engine's prefix cache whatever traffic evicts others, until it is
        unpinned or gone. Returns how many of its tokens: whole blocks; the rest is injected from its file as ever.

        cache_salt: only requests of this salt share the blocks. Raises EngineError where the engine has too few blocks.
        """
        item = self._known(item)
        cache_view = self.store.view(item)
        assert cache_view.file is not None
        self._check_length(len(cache_view.tokens.token_ids), 1)
        salt = salt_of(cache_salt, cache_view)
        with self.lock:
            name = self.pins.name(item, salt)
            transfer = {LOAD: cache_view.file.name, PIN: name}
            (output,) = self._run([Request(uuid.uuid4().hex, cache_view.tokens.token_ids, transfer, salt, 1)])
            report = (output.kv_transfer_params or {})[REPORT]
            if report["load_error"] or report["pin_error"]:
                raise EngineError(f"{item.kv_cache_id} is not pinned: {report['load_error'] or report['pin_error']}")
            self.pins.add(item, Pin(name, salt))
        return int(report["pinned_tokens"])

    def unpin(self, item: KVCacheItem | str) -> None:
        """Lets an item be evicted again, under every salt. Raises EngineError if it is not pinned."""
        with self.lock:
            self.pins.drop(self._known(item))

    def reset(self, unpin: bool = False) -> None:
        """Empties the engine's own prefix cache; files and items stay. Raises EngineError while requests hold blocks,
        or while memories are pinned, naming them, unless `unpin`."""
        with self.lock:
            if unpin:
                self.pins.drop_all()
            elif named := self.pins.named():
                raise EngineError(f"Pinned in the engine's prefix cache: {named}. Unpin, or use reset(unpin=True).")
            if self.pins.to_let_go:  # a request that does nothing else carries it: one token, shared with no other
                list(self._run([Request(uuid.uuid4().hex, (0,), {}, uuid.uuid4().hex, 1)]))
            if not self.llm.reset_prefix_cache():
                raise EngineError("The engine's prefix cache can't be emptied while a request uses it. Let it finish.")

    def _run(self, requests: Sequence[Request]) -> Iterator[RequestOutput]:
        return launch.run(self.llm, self.pins.with_unpins(requests))

    def _known(self, item: KVCacheItem | str) -> KVCacheItem:
        """The item itself, or the one of this kv_cache_id that has a file here. Raises UnknownMemoryError."""
        if isinstance(item, KVCacheItem):
            return item
        for candidate in list(self.store.files):
            if candidate.kv_cache_id == item:
                return candidate
        raise UnknownMemoryError(f"No memory {item!r} has a file in this engine. Give the KVCacheItem itself.")

    def _check_length(self, tokens: int, room: int) -> None:
        if tokens + room > self.window:
            raise PromptError(
                f"A text of {tokens} tokens, and {room} to generate, do not fit the engine's window of {self.window}. "
                "Shorten it, split it into memories, or raise max_model_len."
            )
