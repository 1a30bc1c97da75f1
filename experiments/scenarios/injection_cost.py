"""How long does each injection method take, as a multiple of the least time that the hardware needs?"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments.baselines import vllm_process
from experiments.bench import (
    Bench,
    Measured,
    build_once,
    builds_s,
    compare,
    injection_methods,
    judging_arms,
    p90,
    products_of,
)
from experiments.measurement import BASELINE, statistics, ttft
from experiments.results import (
    ALONE,
    DIRECT,
    GRAPH,
    IN_PLACE,
    AnswerPayload,
    Payload,
    Row,
    TimedPrefill,
    between,
    ttft_of,
)
from experiments.scenarios.base import ModelScenario
from experiments.workloads import Cell, other_questions
from kvmem.cache import KVCacheItem
from kvmem.engines import Backend
from kvmem.engines.graph import HFGraphBackend
from kvmem.errors import ConfigError
from kvmem.models import loading
from kvmem.prompt import TokenizedPrompt
from kvmem.storage import TemporaryFolder

BEATS_LIMIT = "it beats the hardware's limit"
REPEATS = 5
"""The number of repeated measurements of copying a memory into the buffer, and of decoding."""


@plain_dataclass(frozen=True)
class CostCell:
    """One cell of the workload, with vLLM's figures for it."""

    cell: Cell
    peer: vllm_process.Reply | None
    """vLLM's figures; None if vLLM was not measured."""
    decodes: bool
    """Whether to measure the decoding rate as well."""

    @property
    def label(self) -> str:
        return self.cell.label

    @property
    def context_tokens(self) -> int:
        return self.cell.context_tokens

    @property
    def query_tokens(self) -> int:
        return self.cell.query_tokens


@plain_dataclass(frozen=True, kw_only=True)
class InjectionCostPayload(AnswerPayload):
    """One injection method, or one arm without a memory, in one cell. TTFT includes passing the cache to the model."""

    name: ClassVar[str] = "injection_cost"
    columns: ClassVar[tuple[str, ...]] = (
        "context_tokens",
        "query_tokens",
        "ttft_s",
        "ttft_low_s",
        "ttft_high_s",
        "limit_s",
        "over_limit",
        "over_fastest",
        "vllm_s",
        "vllm_quartile_s",
        "over_vllm_quartile",
        "ttft_p90_s",
        "equality",
        "over_query_alone_s",
        "place_s",
    )

    build_s: float | None = None
    kv_bytes: int | None = None
    cached_tokens: int | None = None
    ttft_s: float
    ttft_low_s: float | None = None
    """96.9% interval of the median; None for fewer than 6 rounds."""
    ttft_high_s: float | None = None
    limit_s: float
    """The shortest time for the same work that the roofline model allows."""
    over_limit: float
    """ttft_s divided by limit_s."""
    mfu: float | None = None
    """Model FLOPs utilization: the share of the hardware's peak FLOP/s."""
    over_fastest: float
    """Median of the paired ratios to the fastest injection method."""
    over_fastest_interval: tuple[float, float] | None = None
    vllm_s: float | None = None
    """vLLM's median TTFT in this cell: of a prefix hit for the fastest method, of a cold prompt for the direct arm."""
    vllm_quartile_s: float | None = None
    """vLLM's lower quartile. Its times depend on how busy the host is."""
    over_vllm_quartile: float | None = None
    over_query_alone_s: float | None = None
    """ttft_s minus the TTFT of the query without a memory. Only for the fastest method."""
    place_s: float | None = None
    """Seconds of copying the whole memory into the engine's buffer. Only for the fastest method."""
    ttft_all_s: list[float]
    ttft_p90_s: float | None = None

    def prefills(self, row: Row) -> list[TimedPrefill]:
        """The prefills of the arms that use CUDA graphs. The others have kernel launch costs, which a fleet avoids."""
        total = row.context_tokens + row.query_tokens
        work = {DIRECT: (total, 0), GRAPH: (row.query_tokens, row.context_tokens)}.get(row.arm)
        return [TimedPrefill(row.arm, *work, 0.0, self.ttft_s)] if work else []


@plain_dataclass(frozen=True, kw_only=True)
class DecodingPayload(Payload):
    """Greedy decoding with the longest memory, without the prefill of the first token."""

    name: ClassVar[str] = "decoding behind a memory"
    columns: ClassVar[tuple[str, ...]] = (
        "context_tokens",
        "query_tokens",
        "tokens_a_second",
        "low",
        "high",
        "of_the_limit",
        "vllm_tokens_a_second",
    )

    tokens_a_second: float
    low: float | None = None
    """96.9% interval of the median."""
    high: float | None = None
    of_the_limit: float
    """The rate divided by the highest rate that the roofline model allows."""
    limit_s: float
    """The shortest time for one token that the roofline model allows."""
    tokens_a_second_all: list[float]
    vllm_tokens_a_second: float | None = None


@dataclass(config=ConfigDict(extra="forbid"))
class InjectionCost(ModelScenario[CostCell]):
    """Measures all injection methods with the same weights, in interleaved rounds.

    Each runs from token ids and stored memory to the first token.

    Each time is measured from the token ids and the stored memory to the first token on the host.

    direct            The memory is prompt text, and the graph engine computes it. "direct, eager" is the same with
                      Hugging Face's forward.
    memos, deepcopy, shared tensors
                      A stored cache is passed to Hugging Face's forward (see experiments/baselines).
    in place          The graph engine without CUDA graphs. "in place + graph" uses them, on a GPU.
    query alone       There is no memory. No injection method can be faster.
    """

    pairs: int = Field(default=6, ge=1)
    """Interleaved rounds for each cell; 30 for a published figure. Fewer than 6 give no interval and no verdict."""
    answer_tokens: int = Field(default=16, ge=1)
    """The number of greedy tokens that are compared with the direct arm's."""
    decode_tokens: int = Field(default=128, ge=2)
    """The number of tokens that are decoded with the longest memory to measure the decoding rate."""
    beside_vllm: bool = True
    """Also measure vLLM if it is installed and there is a GPU. It runs in a process of its own, before the rounds."""
    vllm_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds to wait for vLLM's process."""

    engines: ClassVar[tuple[type[Backend], ...]] = (HFGraphBackend,)
    name: ClassVar[str] = "injection_cost"
    question: ClassVar[str] = (
        "How long does each injection method take, as a multiple of the least time that the hardware needs?"
    )

    def cells(self, bench: Bench) -> Sequence[CostCell]:
        setup = bench.setup
        assert isinstance(bench.backend, HFGraphBackend)
        cells = setup.workload.cells(bench.backend.template, setup.separator)
        if any(len(cell.memories) > 1 for cell in cells):
            raise ConfigError("scenario=injection_cost needs one memory in each cell. Use scenario=kv_vs_direct.")
        on_gpu = bench.backend.device.type == "cuda"
        with_vllm = self.beside_vllm and on_gpu and importlib.util.find_spec("vllm") is not None
        peer = _measured_by_vllm(bench, self, cells) if with_vllm else None
        longest = max(cells, key=lambda cell: (cell.context_tokens, -cell.query_tokens))
        return [CostCell(cell, peer, cell is longest) for cell in cells]

    def measure(self, bench: Bench, cell: CostCell) -> list[Row]:
        assert isinstance(bench.backend, HFGraphBackend)
        item = build_once(bench, cell.cell.memories[0])
        split = partial(bench.backend.template.split, item.metadata.tokens)
        question = cell.cell.question
        queries = other_questions(bench.backend.template, item.metadata.tokens, question, self.pairs, bench.setup.seed)
        methods = injection_methods.injection_methods(bench.backend, item, {query: split(query) for query in queries})
        arms = {name: ttft.Arm(method.first_token) for name, method in methods.items()}
        arms[BASELINE] = judging_arms(bench, split)[BASELINE]
        rounds = [queries[i % len(queries)] for i in range(self.pairs)]
        samples, runs = ttft.interleaved_calm(arms, rounds, random.Random(bench.setup.seed))
        judged = samples.pop(BASELINE)
        seconds = {name: [sample.engine_s for sample in taken] for name, taken in samples.items()}
        conditions = bench.conditions_now() | {"measured_times": runs}
        best = best_arm(bench.backend)
        traced = {name: method.trace(self.answer_tokens) for name, method in methods.items() if method.trace}
        products = {name: products_of(bench, samples[name][0], methods[name].first_token, rounds[0]) for name in traced}
        rows = []
        for name, of_arm in samples.items():
            prompt = of_arm[0].prompt
            if name in traced and prompt.memory_ids:
                row = compare(
                    bench,
                    self.name,
                    cell.cell,
                    name,
                    Measured(
                        samples | {BASELINE: judged},
                        traced,
                        runs,
                        len(queries) == 1 < self.pairs,
                        conditions,
                        {name: arm.calls for name, arm in arms.items()},
                        products,
                    ),
                    items=[item],
                    builds_s=builds_s(bench, [item]),
                    direct=methods[name].baseline,
                )
            else:
                row = _row_without_memory(bench, cell, name, prompt, seconds[name], conditions)
            payload = _payload(bench, row, prompt, seconds[name], seconds[best])
            if name == best:
                payload = dataclasses.replace(
                    payload,
                    over_query_alone_s=payload.ttft_s - median(seconds[ALONE]),
                    place_s=_place_s(bench.backend, item),
                )
            if (vllm_s := _vllm_s(cell, name, best)) is not None:
                quartile_s = float(np.percentile(vllm_s, 25))
                payload = dataclasses.replace(
                    payload,
                    vllm_s=median(vllm_s),
                    vllm_quartile_s=quartile_s,
                    over_vllm_quartile=payload.ttft_s / quartile_s,
                )
            rows.append(dataclasses.replace(row, payload=payload))
        return [*rows, *([self._decode_row(bench, cell, item, conditions)] if cell.decodes else [])]

    def _decode_row(self, bench: Bench, cell: CostCell, item: KVCacheItem, conditions: dict[str, Any]) -> Row:
        """Greedy tokens a second with the longest memory, without the prefill of the first token."""
        backend = bench.backend
        assert isinstance(backend, HFGraphBackend)
        prompt = backend.template.split(item.metadata.tokens, cell.cell.question)
        rates = []
        for repeat in range(1 + max(REPEATS, self.pairs // 3)):
            logits_V, answer = backend.engine.begin(item.kv_cache, len(prompt.memory_ids), prompt.query_ids)
            token = int(logits_V.argmax())
            started = time.perf_counter()
            made = backend.engine.greedy(answer, token, self.decode_tokens - 1, ())
            if repeat:
                rates.append(len(made) / (time.perf_counter() - started))
        held = len(prompt.ids) + self.decode_tokens // 2
        low, high = statistics.median_interval(rates) or (None, None)
        limit_s = bench.limit_s(1, held)
        payload = DecodingPayload(
            tokens_a_second=median(rates),
            low=low,
            high=high,
            of_the_limit=median(rates) * limit_s,
            limit_s=limit_s,
            tokens_a_second_all=rates,
            vllm_tokens_a_second=median(cell.peer.decode_tokens_per_s_all) if cell.peer is not None else None,
        )
        is_ok = payload.of_the_limit <= 1
        return bench.row(
            DecodingPayload.name,
            arm=best_arm(backend),
            context_tokens=cell.context_tokens,
            query_tokens=cell.query_tokens,
            context_label=cell.cell.context,
            query_label=cell.cell.query,
            pairs=len(rates),
            conditions=conditions,
            payload=payload,
            verdict="ok" if is_ok else "invalid",
            verdict_reason="" if is_ok else BEATS_LIMIT,
        )

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        payloads = [(row.arm, row.payload) for row in rows if isinstance(row.payload, InjectionCostPayload)]
        fastest = [payload for _, payload in payloads if payload.place_s is not None]
        if not fastest:
            return ""
        over = between([payload.over_limit for payload in fastest], " ×")
        parts = [f"The fastest injection method takes {over} this machine's shortest possible time"]
        if over_vllm := [p.over_vllm_quartile for p in fastest if p.over_vllm_quartile is not None]:
            parts.append(f"{between(over_vllm, ' ×')} vLLM's prefix hit (its lower quartile)")
        direct = [payload.over_fastest for arm, payload in payloads if arm == DIRECT]
        as_text = f"; the same memory as prompt text takes {between(direct, ' ×')} as long" if direct else ""
        return f"{', '.join(parts)}{as_text}."


def best_arm(backend: HFGraphBackend) -> str:
    """The name of the graph engine's fastest injection method on this machine."""
    return GRAPH if backend.engine.graph_up_to else IN_PLACE


def _row_without_memory(
    bench: Bench,
    cell: CostCell,
    name: str,
    prompt: TokenizedPrompt,
    seconds: Sequence[float],
    conditions: dict[str, Any],
) -> Row:
    """The row of an arm that computes its whole prompt. It has no answer to compare."""
    beats_limit = median(seconds) < bench.limit_s(len(prompt.ids), 0)
    return bench.row(
        InjectionCost.name,
        arm=name,
        context_tokens=cell.context_tokens,
        query_tokens=cell.query_tokens,
        context_label=cell.cell.context,
        query_label=cell.cell.query,
        pairs=len(seconds),
        verdict="invalid" if beats_limit else "ok",
        verdict_reason=BEATS_LIMIT if beats_limit else "",
        conditions=conditions,
    )


def _payload(
    bench: Bench, row: Row, prompt: TokenizedPrompt, seconds: Sequence[float], fastest_s: Sequence[float]
) -> InjectionCostPayload:
    """The figures of one arm. Those that come from a comparison with the direct arm are None if `row` has none."""
    compared = ttft_of(row)
    cached_tokens = compared.cached_tokens if compared else 0
    new_tokens = len(prompt.ids) - cached_tokens
    ttft_s, limit_s = median(seconds), bench.limit_s(new_tokens, cached_tokens)
    low_s, high_s = statistics.median_interval(seconds) or (None, None)
    over_fastest, interval = statistics.paired_ratio(seconds, fastest_s)
    return InjectionCostPayload(
        question=compared.question if compared else None,
        truth=compared.truth if compared else None,
        answers=compared.answers if compared else {},
        build_s=compared.build_s if compared else None,
        kv_bytes=compared.kv_bytes if compared else None,
        cached_tokens=compared.cached_tokens if compared else None,
        ttft_s=ttft_s,
        ttft_low_s=low_s,
        ttft_high_s=high_s,
        limit_s=limit_s,
        over_limit=ttft_s / limit_s,
        mfu=bench.roofline.mfu(new_tokens, cached_tokens, ttft_s),
        over_fastest=over_fastest,
        over_fastest_interval=interval,
        ttft_all_s=list(seconds),
        ttft_p90_s=p90(seconds),
    )


def _place_s(backend: HFGraphBackend, item: KVCacheItem) -> float:
    """Median seconds of copying the whole memory into the engine's buffer, where it replaces another memory."""
    times = []
    for repeat in range(1 + REPEATS):
        backend.engine.forget()
        ttft.synchronize(backend.device)
        started = time.perf_counter()
        backend.engine.place(item.kv_cache)
        ttft.synchronize(backend.device)
        if repeat:
            times.append(time.perf_counter() - started)
    return median(times)


def _vllm_s(cell: CostCell, name: str, best: str) -> list[float] | None:
    """vLLM's TTFTs in this cell that compare with an arm; None if there are none.

    They are of a prefix hit for the fastest arm, and of a cold prompt for the direct arm.
    """
    peer = cell.peer and cell.peer.cell(cell.context_tokens, cell.query_tokens)
    if not peer or name not in (best, DIRECT):
        return None
    return peer.hit_all_s if name == best else peer.cold_all_s


def _measured_by_vllm(bench: Bench, scenario: InjectionCost, cells: Sequence[Cell]) -> vllm_process.Reply:
    with TemporaryFolder("kvmem-injection-cost-") as folder:
        return vllm_process.measure_in_process(_request(bench, scenario, cells, folder), scenario.vllm_timeout_s)


def _request(bench: Bench, scenario: InjectionCost, cells: Sequence[Cell], folder: Path) -> vllm_process.Request:
    """What vLLM's process measures. folder: where the configuration of a model with random weights is written."""
    name, config = bench.setup.model.source(), bench.backend.model_config
    is_random = name.startswith(loading.RANDOM)
    if is_random:
        name = str(folder)
        config = copy.deepcopy(config)
        config.architectures = [bench.backend.fingerprint.architecture]
        config.save_pretrained(name)
    elif name == loading.PACKAGED:
        name = str(loading.packaged_folder() or loading.PACKAGED_HUB_NAME)
    return vllm_process.Request(
        model=name,
        dummy_weights=is_random,
        dtype=str(bench.backend.dtype).removeprefix("torch."),
        vocab=config.vocab_size,
        cells=[(cell.context_tokens, cell.query_tokens) for cell in cells],
        rounds=scenario.pairs,
        decode_tokens=scenario.decode_tokens,
    )
