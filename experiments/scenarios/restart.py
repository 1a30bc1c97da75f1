"""What does the first request for a memory wait after a restart of the engine, beside a hit while it runs?"""

from __future__ import annotations

import gc
import uuid
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from statistics import median
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.bench import Bench, Load, Setup, judged_again, serve
from experiments.load_arms import LoadArm, arm_of
from experiments.results import DIRECT, JudgedPayload, Row, formatting, ttft_of
from experiments.scenarios.base import ModelScenario
from experiments.scenarios.under_load import (
    QUESTION_TOKENS,
    WARM,
    ArmCell,
    UnderLoad,
    failed,
    too_fast,
    wrong_clocks,
)
from experiments.workloads import memory_question, memory_text
from kvmem.cache import KVCacheItem
from kvmem.engines import Backend
from kvmem.engines.vllm import VLLMBackend
from kvmem.errors import ConfigError

WARM_UPS = 3


@plain_dataclass(frozen=True, kw_only=True)
class Restarted:
    """One fresh engine: loads of one request each."""

    first: Load
    """The first request for the memory, whose file the engine has never read."""
    warm: list[Load]
    """The next ones, with the file in host memory and an empty prefix cache."""
    text: list[Load]
    """The memory as text, with nothing in a cache."""


@plain_dataclass(frozen=True, kw_only=True)
class RestartPayload(JudgedPayload):
    """TTFT on engines that were just started. With several restarts, each figure is their median.

    `judged` compares a hit with the direct arm on the engine that built the memory, in interleaved rounds.
    """

    name: ClassVar[str] = "restart"
    columns: ClassVar[tuple[str, ...]] = (
        "first_ttft_s",
        "warm_ttft_s",
        "first_over_warm",
        "over_warm_low",
        "over_warm_high",
        "text_ttft_s",
        "first_over_text",
        "restarts",
    )

    first_ttft_s: float
    """Of the first request for the memory after the restart."""
    warm_ttft_s: float
    """Of a hit while the engine runs: the median of `pairs`."""
    first_over_warm: float
    over_warm_low: float | None = None
    """The lowest of the restarts; None for one."""
    over_warm_high: float | None = None
    text_ttft_s: float
    """Of the memory as text, which is what the first request takes without kvmem."""
    first_over_text: float
    restarts: int
    engines: list[Restarted] = field(default_factory=list)
    """Every request, by restart."""

    def recomputed(self, row: Row) -> dict[str, float | None]:
        return dict(_figures(self.engines))

    def failures(self, row: Row) -> list[str]:
        evidence = self.judged.evidence if self.judged else None
        allowed = 2 * ((evidence.tolerance if evidence else None) or 0.0)
        found = []
        for engine in self.engines:
            for load in (engine.first, *engine.warm, *engine.text):
                (one,) = load.requests
                found += [*failed([one]), *too_fast([one]), *wrong_clocks(load)]
                if not one.error and (one.margin is None or one.margin > allowed):
                    found.append("an answer is not that of vLLM's own cold prefill")
            hits = [engine.first, *engine.warm]
            if any(load.requests[0].injected_tokens < load.requests[0].memory_tokens for load in hits):
                found.append("a request did not have its whole memory from the file")
            if engine.first.files_read != 1 or any(load.files_read for load in engine.warm):
                found.append("the first request read no file, or a later one did")
            if any(load.requests[0].cached_tokens for load in engine.text):
                found.append("tokens of the text came from a cache")
        return list(dict.fromkeys(found))


@dataclass(config=ConfigDict(extra="forbid"))
class Restart(ModelScenario[ArmCell]):
    """An engine builds a memory. Another one, started afresh with the same files, is warmed up with other text, and
    then gets the first request for the memory. Its file is in the page cache, where the engine that wrote it left it.
    """

    memory_tokens: PositiveInt = 256
    restarts: PositiveInt = 1
    """Fresh engines; 3 or more for a published figure."""
    pairs: PositiveInt = 6
    """Hits, and prompts of text, after each restart; and rounds by which the arm is judged."""
    new_tokens: PositiveInt = 4

    engines: ClassVar[tuple[type[Backend], ...]] = (VLLMBackend,)
    measures_workload: ClassVar[bool] = False
    name: ClassVar[str] = "restart"
    question: ClassVar[str] = "What does the first request for a memory wait after a restart of the engine?"

    def __post_init__(self) -> None:
        self._load = UnderLoad(
            memories=1, memory_tokens=self.memory_tokens, pairs=self.pairs, new_tokens=self.new_tokens
        )

    def check(self, setup: Setup) -> None:
        super().check(setup)
        window = getattr(setup.backend, "max_model_len", None)
        if window is not None and self.memory_tokens + QUESTION_TOKENS + self.new_tokens > window:
            longest = self.memory_tokens + QUESTION_TOKENS
            raise ConfigError(
                f"backend.max_model_len={window} does not hold a prompt of about {longest} tokens and "
                f"{self.new_tokens} of the answer. Raise it, or lower scenario.memory_tokens."
            )
        if torch.cuda.is_available() and getattr(setup.backend, "kv_cache_gib", None) is None:
            raise ConfigError(
                "The fresh engine runs beside the one that built the memory, so each needs a fixed room for KV. Set "
                "backend.kv_cache_gib."
            )

    def cells(self, bench: Bench) -> Sequence[ArmCell]:
        (item,) = self._load.items(bench)
        question = self._load.question_to_first(bench, 0, 0)
        query_tokens = len(bench.backend.template.split(item.metadata.tokens, question).query_ids)
        return [ArmCell(arm_of(WARM).arm, self.memory_tokens, query_tokens, 0.0, 0.0, (), ())]

    def measure(self, bench: Bench, cell: ArmCell) -> list[Row]:
        shared = bench.backend
        assert isinstance(shared, VLLMBackend)
        (item,) = self._load.items(bench)
        engines = []
        for _ in range(self.restarts):
            fresh = shared.beside()
            engines.append(self._restarted(bench, fresh, item))
            del fresh
            gc.collect()  # its memory is free for the next one
        idle = self._load.idle(bench, shared, arm_of(WARM), cell, item)
        payload = RestartPayload(**_figures(engines), restarts=len(engines), engines=engines, judged=ttft_of(idle))
        return [judged_again(replace(idle, scenario=self.name, payload=payload))]

    def _restarted(self, bench: Bench, engine: VLLMBackend, item: KVCacheItem) -> Restarted:
        seed, template = bench.setup.seed, engine.template
        for number in range(WARM_UPS):  # other text of the same length
            words = memory_text(seed, 1 + number).split()[: self.memory_tokens]
            ids = template.bare(" ".join(words)).ids[: self.memory_tokens]
            engine.hold_prefix((*ids, *template.bare(memory_question(seed, 1 + number)).ids), uuid.uuid4().hex)
        injected, text = arm_of(WARM), arm_of(DIRECT)
        first = self._one(bench, engine, injected, item, 0)
        warm = [self._one(bench, engine, injected, item, 1 + number) for number in range(self.pairs)]
        cold = [self._one(bench, engine, text, item, 1 + number) for number in range(self.pairs)]
        return Restarted(first=first, warm=warm, text=cold)

    def _one(self, bench: Bench, engine: VLLMBackend, arm: LoadArm, item: KVCacheItem, number: int) -> Load:
        """A load of one request, on an engine with an empty prefix cache."""
        question = self._load.question_to_first(bench, 0, number)
        prompt = engine.template.split(item.metadata.tokens, question)
        sent = arm.sent(prompt, bench.memory.get_cache([item.kv_cache_id])).at(0.0, self.new_tokens)
        engine.reset()
        before = engine.host_cache().reads
        load = serve(bench, engine, [sent], [0], [arm.held_tokens(engine, prompt)])
        return replace(load, files_read=engine.host_cache().reads - before)

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        found = [row.payload for row in rows if isinstance(row.payload, RestartPayload)]
        if not found:
            return ""
        one = found[0]
        return (
            f"{formatting.seconds(one.first_ttft_s)}, {formatting.times(one.first_over_warm)} a hit while the engine "
            f"runs ({formatting.seconds(one.warm_ttft_s)}); as text it takes {formatting.seconds(one.text_ttft_s)}."
        )


def _figures(engines: Sequence[Restarted]) -> dict[str, Any]:
    """The figures that follow from the requests."""
    first_s = [_ttft_s([engine.first]) for engine in engines]
    warm_s = [_ttft_s(engine.warm) for engine in engines]
    text_s = [_ttft_s(engine.text) for engine in engines]
    over = [first / warm for first, warm in zip(first_s, warm_s, strict=True)]
    figures = {
        "first_ttft_s": median(first_s),
        "warm_ttft_s": median(warm_s),
        "first_over_warm": median(over),
        "text_ttft_s": median(text_s),
        "first_over_text": median(first / text for first, text in zip(first_s, text_s, strict=True)),
    }
    return figures | ({"over_warm_low": min(over), "over_warm_high": max(over)} if len(over) > 1 else {})


def _ttft_s(loads: Sequence[Load]) -> float:
    return median(load.requests[0].first_token_s for load in loads)
