"""The memory is text of every prompt, and nothing is reused."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import ClassVar

from experiments.load_arms.base import LoadArm, Reuse, Sent
from experiments.results import DIRECT
from kvmem.engines import Injectable
from kvmem.engines.vllm import VLLMBackend
from kvmem.prompt import TokenizedPrompt


class Text(LoadArm):
    """Each request has a salt of its own, so requests share no blocks, as with prefix caching off."""

    name: ClassVar[str] = "text"
    arm: ClassVar[str] = DIRECT
    place: ClassVar[int] = 0
    reuses: ClassVar[bool] = False

    def sent(self, prompt: TokenizedPrompt, view: Injectable) -> Sent:
        return Sent(TokenizedPrompt((), prompt.ids), cache_salt=uuid.uuid4().hex)

    def held_tokens(self, engine: VLLMBackend, prompt: TokenizedPrompt) -> int:
        return 0

    def wrong_hits(self, requests: Sequence[Reuse], block_tokens: int) -> list[str]:
        cached = sum(one.cached_tokens for one in requests)
        return [f"{cached} tokens of the direct arm came from a cache"] if cached else []
