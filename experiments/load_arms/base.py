"""The interface of an arm of a load: what engine it needs, how it is prepared, and what a request sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from experiments.measurement import Trace, ttft
from kvmem.cache import KVCacheItem
from kvmem.engines import Injectable
from kvmem.engines.vllm import Arrival, VLLMBackend
from kvmem.prompt import TokenizedPrompt
from kvmem.registry import Registry


class Reuse(Protocol):
    """What the rules of an arm look at in a request."""

    @property
    def is_answered(self) -> bool: ...

    @property
    def memory_tokens(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...

    @property
    def injected_tokens(self) -> int: ...


@dataclass(frozen=True)
class Sent:
    """What one request gives to the engine."""

    prompt: TokenizedPrompt
    kv_cache: Injectable | None = None
    cache_salt: str | None = None
    orders: Mapping[str, Any] = field(default_factory=dict)

    def at(self, at_s: float, new_tokens: int) -> Arrival:
        return Arrival(at_s, self.prompt, self.kv_cache, new_tokens, self.cache_salt, self.orders)


class LoadArm(ABC):
    """One way to serve requests that use a memory. A new arm is one new file in this package."""

    name: ClassVar[str]
    """In `scenario.arms`."""
    arm: ClassVar[str]
    """In rows."""
    place: ClassVar[int] = 100
    """Its place among the arms; the lowest is measured first."""
    own_engine: ClassVar[bool] = False
    """Whether it needs an engine with settings of its own; the others share one."""
    needs_files: ClassVar[bool] = False
    """Whether all memory files have to fit into host memory (`backend.host_cache_gib`)."""
    is_peer: ClassVar[bool] = False
    """Whether it shows what an engine does without us: it may not be slower than `LLM.generate` of the same engine."""
    reuses: ClassVar[bool] = True
    """Whether blocks that an earlier request left are used."""

    def unavailable(self) -> str:
        """Why the arm can't be measured on this machine; "" if it can."""
        return ""

    def engine(self, shared: VLLMBackend) -> VLLMBackend:
        """The engine that serves it: the shared one, or one that is started now. Raises EngineError."""
        return shared

    def prepare(self, engine: VLLMBackend, items: Sequence[KVCacheItem]) -> None:
        """Puts the engine into the state in which a load begins."""
        engine.reset()

    def prepare_alone(self, engine: VLLMBackend, item: KVCacheItem) -> None:
        """Puts an idle engine into the state in which one request reuses what the arm reuses."""
        self.prepare(engine, [item])

    @abstractmethod
    def sent(self, prompt: TokenizedPrompt, view: Injectable) -> Sent:
        """What a request sends. prompt: split after the memory. view: the memory."""

    @abstractmethod
    def held_tokens(self, engine: VLLMBackend, prompt: TokenizedPrompt) -> int:
        """How many prompt tokens a hit spares at least, under load."""

    def held_alone(self, engine: VLLMBackend, prompt: TokenizedPrompt) -> int:
        """The same for one request on an idle engine."""
        return self.held_tokens(engine, prompt)

    def trace(self, engine: VLLMBackend, prompt: TokenizedPrompt, view: Injectable, steps: int) -> Trace:
        """The graded answer of one request."""
        sent = self.sent(prompt, view)
        return ttft.trace(engine, sent.prompt, None if sent.kv_cache is None else lambda: view, steps)

    @abstractmethod
    def wrong_hits(self, requests: Sequence[Reuse], block_tokens: int) -> list[str]:
        """What contradicts the arm in its requests that use a memory: each reuses what it says, and nothing else."""


def whole_memory_missed(requests: Sequence[Reuse]) -> list[str]:
    """For arms that inject: each request has its whole memory from KV, and some of it from a file."""
    missed = sum(one.is_answered and one.cached_tokens < one.memory_tokens for one in requests)
    found = [f"{missed} of {len(requests)} requests did not have their whole memory from KV"] if missed else []
    return found + ([] if any(one.injected_tokens for one in requests) else ["no token was injected"])


def more_than_memory(requests: Sequence[Reuse], slack_tokens: int = 0) -> list[str]:
    """Nothing beyond the memory is reused."""
    if any(one.cached_tokens > one.memory_tokens + slack_tokens for one in requests):
        return ["more tokens of a request came from a cache than its memory has"]
    return []


ARMS = Registry(LoadArm, "experiments.load_arms", "arm of a load")


def every_arm() -> list[LoadArm]:
    """Every arm that there is, in the order in which they are measured."""
    return [cls() for cls in sorted(ARMS.classes().values(), key=lambda cls: (cls.place, cls.name))]


def arm_of(label: str) -> LoadArm:
    """The arm that rows call `label`. Raises KeyError if there is none."""
    return {arm.arm: arm for arm in every_arm()}[label]
