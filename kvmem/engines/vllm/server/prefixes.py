"""Memories that are prefixes in a server's own cache: put there once, and every later hit on one verified."""

from __future__ import annotations

import time
from dataclasses import replace

from kvmem.engines.base import FileHandle
from kvmem.engines.vllm.config import VLLMGeneration
from kvmem.engines.vllm.server.client import ServerClient, ServerRequest
from kvmem.errors import InjectionError
from kvmem.prompt import TokenizedPrompt

Held = tuple[tuple[int, ...], str | None]
"""Token ids, and the tenant's salt under which a server holds them."""


class Prefixes:
    """What this client has warmed up on one server, and how many tokens that spares a request."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self.held: dict[Held, int] = {}

    def warm_up(self, token_ids: tuple[int, ...], salt: str | None) -> float:
        """Prefills the ids on the server; how long that took. A second request then tells what it holds of them: whole
        blocks, whose size only the server knows, and nothing at all where it keeps no prefixes."""
        request = ServerRequest(token_ids, 1, salt=salt, past_end=True)
        started = time.perf_counter()
        self.client.complete(request)
        build_s = time.perf_counter() - started
        self.held[token_ids, salt] = self.client.complete(request).cached_tokens
        return build_s

    def check_warm(self, cache_view: FileHandle, salt: str | None) -> None:
        """Raises InjectionError for a prefix that this client has not warmed up for this tenant."""
        if cache_view.file is None and (cache_view.tokens.token_ids, salt) not in self.held:
            tenant = f"the cache_salt {salt!r}" if salt else "requests without a cache_salt"
            raise InjectionError(
                f"This memory was not warmed up on {self.client.name} for {tenant}, so it would be computed. "
                "Call warm_up(item, cache_salt) first, or use on_miss='recompute'."
            )

    def verified(
        self,
        answer: VLLMGeneration,
        prompt: TokenizedPrompt,
        cache_view: FileHandle | None,
        salt: str | None,
        may_recompute: bool,
    ) -> VLLMGeneration:
        """The answer, once the server's count says that it was spared what it held of a prefix; else InjectionError."""
        held = (
            0
            if cache_view is None or cache_view.file is not None
            else self.held.get((cache_view.tokens.token_ids, salt), 0)
        )
        # A query that changes the memory's last tokens may break into its last block; then the count can't be foretold.
        promised = held if len(prompt.memory_ids) >= held else 0
        if answer.cached_tokens >= promised:
            return answer
        if may_recompute:
            return replace(answer, recomputed_tokens=promised - answer.cached_tokens)
        raise InjectionError(
            f"{self.client.name} held {promised} tokens of this memory when it was warmed up, and reused "
            f"{answer.cached_tokens}: it was evicted, or the server was restarted. Call warm_up again, or use "
            "on_miss='recompute'."
        )
