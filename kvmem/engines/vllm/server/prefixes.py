"""Memories that are prefixes in a server's own cache: prefilled once, and verified at every later hit."""

from __future__ import annotations

import time
from dataclasses import replace

from kvmem.engines.base import FileHandle
from kvmem.engines.vllm.requests import EngineRequest, VLLMGeneration
from kvmem.engines.vllm.server.client import ServerClient
from kvmem.errors import InjectionError
from kvmem.prompt import TokenizedPrompt

PrefixKey = tuple[tuple[int, ...], str | None]
"""Token ids, and the tenant's salt under which the server holds them."""


class Prefixes:
    """The prefixes that this client has warmed up on one server, and how many tokens each spares a request."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self.held: dict[PrefixKey, int] = {}

    def warm_up(self, token_ids: tuple[int, ...], salt: str | None) -> float:
        """Prefills the ids on the server. Returns the seconds that this took.

        A second request then counts how many of them the server holds: whole blocks, whose size only the server knows;
        none if it has no prefix cache.
        """
        request = EngineRequest(token_ids, 1, salt=salt, past_end=True)
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
        """The answer, if the server reused as many tokens of a prefix as it held when that was warmed up.

        Raises InjectionError if it reused fewer, unless `may_recompute`: then they are counted as recomputed.
        """
        if cache_view is None or cache_view.file is not None:
            return answer
        held = self.held.get((cache_view.tokens.token_ids, salt), 0)
        # A query that changes the memory's last tokens may also change its last block: the count is then unknown.
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
