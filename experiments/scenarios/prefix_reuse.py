"""What does an injected memory save over the engine's own prefix cache, and over no cache?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from functools import partial
from statistics import median
from typing import ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments.bench import Bench, Measured, Setup, build_once, builds_s, compare, judging_arms, p90
from experiments.measurement import statistics, transfer_s, ttft, vllm_generate
from experiments.results import GENERATE, NATIVE, Row, TTFTPayload
from experiments.scenarios.base import ModelScenario
from experiments.workloads import Cell, other_questions
from kvmem.cache import KVCacheItem
from kvmem.engines import Injectable, backend_class
from kvmem.engines.huggingface import HFBackend
from kvmem.engines.vllm import VLLMBackend
from kvmem.errors import ConfigError


@plain_dataclass(frozen=True, kw_only=True)
class PrefixReusePayload(TTFTPayload):
    """The comparison with the direct arm and with the engine's own prefix hit. Ratios are medians of paired ratios."""

    name: ClassVar[str] = "prefix_reuse"

    injected_over_native_hit: float | None = None
    injected_over_native_hit_interval: tuple[float, float] | None = None
    transfer_s: float | None = None
    """Seconds of copying the memory from pinned host memory to the GPU. With several ranks, each copies its share."""
    over_transfer_or_native_hit: float | None = None
    """The injected TTFT divided by the slower of the transfer and the prefix hit."""
    generate_ttft_s: float | None = None
    """TTFT of a prefix hit through vLLM's own LLM.generate."""
    generate_ttft_all_s: list[float] = field(default_factory=list)
    generate_ttft_p90_s: float | None = None
    native_hit_over_generate: float | None = None
    native_hit_over_generate_interval: tuple[float, float] | None = None


@dataclass(config=ConfigDict(extra="forbid"))
class PrefixReuse(ModelScenario[Cell]):
    """Measures three arms in interleaved rounds. The engine's prefix cache is emptied before each measurement.

    direct      The engine computes all tokens.
    native hit  The engine finds the memory's full blocks in its own prefix cache. Before each measurement they are
                filled from the memory's file. The answer that is graded uses blocks from the engine's own prefill.
    injected    The memory's file is loaded into the engine's blocks, up to its last token.
    """

    pairs: int = Field(default=6, ge=1)
    """Interleaved rounds for each cell; 30 for a published figure. Fewer than 6 give no interval and no verdict."""
    answer_tokens: int = Field(default=8, ge=1)
    """The number of greedy tokens that are compared."""
    beside_generate: bool = True
    """On a GPU, also measure the native hit through vLLM's own LLM.generate, which shows the overhead of our engine."""

    name: ClassVar[str] = "prefix_reuse"
    question: ClassVar[str] = "What does an injected memory save over the engine's own prefix cache, and over no cache?"

    def check(self, setup: Setup) -> None:
        super().check(setup)
        if issubclass(backend_class(setup.backend.backend), HFBackend):
            raise _no_prefix_cache(setup.backend.backend)

    def cells(self, bench: Bench) -> Sequence[Cell]:
        if bench.backend.prefix_block_tokens is None:
            raise _no_prefix_cache(type(bench.backend).name)
        setup = bench.setup
        cells = setup.workload.cells(bench.backend.template, setup.separator)
        if any(len(cell.memories) > 1 for cell in cells):
            raise ConfigError(
                "scenario=prefix_reuse needs one memory in each cell. Use scenario=kv_vs_direct for merges."
            )
        return cells

    def measure(self, bench: Bench, cell: Cell) -> list[Row]:
        item = build_once(bench, cell.memories[0])
        bench.memory.add(item)
        try:
            return self._compare(bench, cell, item)
        finally:
            bench.memory.delete(item.kv_cache_id)

    def _compare(self, bench: Bench, cell: Cell, item: KVCacheItem) -> list[Row]:
        memory, backend, ids = bench.memory, bench.backend, [item.kv_cache_id]
        tokens = item.metadata.tokens

        def view() -> Injectable:
            return memory.get_cache(ids)

        split = partial(backend.template.split, tokens)
        prompt = ttft.direct_prompt(backend, tokens, cell.question)
        injected_prompt = backend.split(cell.question, view())
        # Generating the answers first warms up the shapes of each arm.
        traces = {
            "direct": ttft.trace(backend, prompt, None, self.answer_tokens),
            "injected": ttft.trace(backend, injected_prompt, view, self.answer_tokens),
            NATIVE: ttft.native_trace(backend, injected_prompt, self.answer_tokens),
        }
        queries = other_questions(backend.template, tokens, cell.question, self.pairs, bench.setup.seed)

        def fill() -> None:
            ttft.fill_prefix_cache(backend, tokens.token_ids, view)

        arms = {
            "injected": ttft.Arm(partial(ttft.injected, memory, backend, ids), backend.reset),
            NATIVE: ttft.Arm(partial(ttft.native_hit, backend, tokens), fill),
            "direct": ttft.Arm(partial(ttft.direct, backend, tokens), backend.reset),
            **judging_arms(bench, split),
        }
        if self.beside_generate and isinstance(backend, VLLMBackend) and backend.compute_device.type == "cuda":
            generate = partial(vllm_generate.first_token, backend.llm)
            arms[GENERATE] = ttft.Arm(partial(ttft.native_hit, backend, tokens, first_token=generate), fill)
        rounds = [queries[i % len(queries)] for i in range(self.pairs)]
        samples, runs = ttft.interleaved_calm(arms, rounds, random.Random(bench.setup.seed), warmups=0)
        calls = {name: arm.calls for name, arm in arms.items()}
        measured = Measured(samples, traces, runs, len(queries) == 1 < self.pairs, bench.conditions_now(), calls)
        rows = []
        for name in ("injected", NATIVE):
            payload: Callable[..., PrefixReusePayload] = PrefixReusePayload
            injected_s, native_s = measured.engine_s("injected"), measured.engine_s(NATIVE)
            if name == "injected":
                over, interval = statistics.paired_ratio(injected_s, native_s)
                payload = partial(payload, injected_over_native_hit=over, injected_over_native_hit_interval=interval)
                if moved_s := transfer_s(item.metadata.kv_bytes // backend.ranks, backend.compute_device):
                    over_slower = median(injected_s) / max(moved_s, median(native_s))
                    payload = partial(payload, transfer_s=moved_s, over_transfer_or_native_hit=over_slower)
            elif GENERATE in samples:
                generate_s = measured.engine_s(GENERATE)
                over, interval = statistics.paired_ratio(native_s, generate_s)
                payload = partial(
                    payload,
                    generate_ttft_s=median(generate_s),
                    generate_ttft_all_s=generate_s,
                    generate_ttft_p90_s=p90(generate_s),
                    native_hit_over_generate=over,
                    native_hit_over_generate_interval=interval,
                )
            rows.append(
                compare(
                    bench,
                    self.name,
                    cell,
                    name,
                    measured,
                    items=[item],
                    builds_s=builds_s(bench, [item]),
                    payload=payload,
                    peer=GENERATE if name == NATIVE and GENERATE in samples else "",
                )
            )
        return rows


def _no_prefix_cache(engine: str) -> ConfigError:
    return ConfigError(
        f"scenario=prefix_reuse needs an engine with a prefix cache of its own, and backend={engine} has none. "
        "Use backend=vllm, or scenario=kv_vs_direct."
    )
