"""Clients send plain text, and the engine finds the memories by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from experiments.load_arms.base import Reuse, Sent, more_than_memory, whole_memory_missed
from experiments.load_arms.injected import Injected
from experiments.measurement import ttft
from kvmem.engines import Injectable
from kvmem.engines.vllm import VLLMBackend
from kvmem.engines.vllm.connector import AUTO, INJECT
from kvmem.prompt import TokenizedPrompt


class InjectedAuto(Injected):
    """As a server with `--inject auto`: requests name no memory, only ask for a report of what they were given.

    The files are in host memory when a load begins. Where the engine holds all whole blocks of a memory, the rest of
    it is computed.
    """

    name: ClassVar[str] = "injected_auto"
    arm: ClassVar[str] = "injected auto"
    place: ClassVar[int] = 13
    own_engine: ClassVar[bool] = True

    def engine(self, shared: VLLMBackend) -> VLLMBackend:
        return shared.beside(inject=AUTO)

    def sent(self, prompt: TokenizedPrompt, view: Injectable) -> Sent:
        return Sent(TokenizedPrompt((), prompt.ids), orders={INJECT: True})

    def held_tokens(self, engine: VLLMBackend, prompt: TokenizedPrompt) -> int:
        return ttft.whole_blocks(engine, len(prompt.memory_ids))

    def held_alone(self, engine: VLLMBackend, prompt: TokenizedPrompt) -> int:
        return len(prompt.memory_ids)

    def wrong_hits(self, requests: Sequence[Reuse], block_tokens: int) -> list[str]:
        return more_than_memory(requests, block_tokens - 1) + whole_memory_missed(requests)
