"""How long does each injection method take, as a multiple of the least time that the hardware needs?"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from statistics import median
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments.baselines import vllm_process
from experiments.bench import Arm, Bench, built_once, compare, every_sample, injection_methods, ratio
from experiments.measurement import ttft
from experiments.results import ALONE, DIRECT, GRAPH, IN_PLACE, Row, between
from experiments.scenarios.base import ModelScenario
from experiments.workloads import Cell
from kvmem.cache import KVCacheItem
from kvmem.engines.graph import HFGraphBackend
from kvmem.errors import ConfigError
from kvmem.models import loading
from kvmem.prompt import TokenizedPrompt

DECODING = "decoding behind a memory"
"""The rate of decoding is a table of its own."""
REPEATS = 5
"""Of placing a memory, and of decoding: each takes what one round of all ways does."""


@plain_dataclass(frozen=True)
class CostCell:
    """One cell, and vLLM's figures where it was asked. `decodes`: measure the rate of decoding too."""

    cell: Cell
    peer: vllm_process.Reply | None
    decodes: bool

    @property
    def label(self) -> str:
        return self.cell.label

    @property
    def context_tokens(self) -> int:
        return self.cell.context_tokens

    @property
    def query_tokens(self) -> int:
        return self.cell.query_tokens


@dataclass(config=ConfigDict(extra="forbid"))
class InjectionCost(ModelScenario[CostCell]):
    """All ways on the same weights, in interleaved rounds; each from token ids and stored memory to the token.

    direct            the memory as prompt text, by the fast engine; "direct, eager" by Hugging Face's forward
    memos, deepcopy, shared tensors   a stored cache passed to Hugging Face's forward (experiments/recipes)
    in place          the fast engine without graphs; "in place + graph" with them, where there is a GPU
    query alone       no memory at all: what no injection can beat
    """

    pairs: int = Field(default=5, ge=1)
    """Interleaved rounds a cell; 30 for a figure to publish. Fewer than 3 have no interval."""
    answer_tokens: int = Field(default=16, ge=1)
    """Greedy tokens of each way that are compared with the direct one's."""
    decode_tokens: int = Field(default=128, ge=2)
    """Tokens decoded behind the longest memory, for the rate of decoding."""
    beside_vllm: bool = True
    """Ask vLLM too, where it is installed and there is a GPU: in a process of its own, before our rounds."""
    vllm_timeout_s: float = Field(default=600.0, gt=0)

    name: ClassVar[str] = "injection_cost"
    question: ClassVar[str] = (
        "How long does each injection method take, as a multiple of the least time that the hardware needs?"
    )

    def cells(self, bench: Bench) -> Sequence[CostCell]:
        setup = bench.setup
        if not isinstance(bench.backend, HFGraphBackend):
            raise ConfigError(
                f"scenario=injection_cost compares ways on the fast engine's weights, and this is "
                f"backend={type(bench.backend).name}. Use backend=hf_graph."
            )
        cells = setup.workload.cells(bench.backend.template, setup.separator)
        if any(len(cell.memories) > 1 for cell in cells):
            raise ConfigError("scenario=injection_cost is about one memory a cell. Use scenario=kv_vs_direct.")
        asks = self.beside_vllm and bench.backend.device.type == "cuda" and importlib.util.find_spec("vllm") is not None
        peer = vllm_process.measure_in_process(_request(bench, self, cells), self.vllm_timeout_s) if asks else None
        longest = max(cells, key=lambda cell: (cell.context_tokens, -cell.query_tokens))
        return [CostCell(cell, peer, cell is longest) for cell in cells]

    def measure(self, bench: Bench, cell: CostCell) -> list[Row]:
        assert isinstance(bench.backend, HFGraphBackend)
        item = built_once(bench, cell.cell.memories[0])
        found = injection_methods.ways(bench.backend, item, cell.cell.question)
        arms: dict[str, ttft.Arm] = {name: way.first_token for name, way in found.items()}
        samples, runs = ttft.interleaved_calm(arms, self.pairs, random.Random(bench.setup.seed))
        seconds = {name: [sample.engine_s for sample in taken] for name, taken in samples.items()}
        conditions = bench.conditions_now() | {"measured_times": runs}
        best = best_arm(bench.backend)
        traced = {name: way.trace(self.answer_tokens) for name, way in found.items() if way.trace is not None}
        rows = []
        for name, taken in samples.items():
            prompt = taken[0].prompt
            figures: dict[str, Any] = {
                "context": cell.cell.context,
                "query": cell.cell.query,
                "context_tokens": cell.context_tokens,
                "query_tokens": cell.query_tokens,
                "ttft_s": median(seconds[name]),
            }
            if name in traced and prompt.memory_ids:
                beside = found[name].beside
                direct = Arm(samples[beside], traced[beside])
                row = compare(
                    bench,
                    self.name,
                    cell.cell,
                    name,
                    Arm(taken, traced[name]),
                    direct,
                    build_s=item.metadata.build_s,
                    kv_bytes=item.metadata.kv_bytes,
                    conditions=conditions,
                    extra={},
                    engine=found[name].engine,
                )
                figures["equal"] = row.equality
            else:
                row = _row_without_memory(bench, cell, name, prompt, seconds[name], conditions)
            assert row.limit_s is not None
            low_s, high_s = ttft.median_interval(seconds[name]) or (None, None)
            figures |= {"ttft_low_s": low_s, "ttft_high_s": high_s, "limit_s": row.limit_s}
            figures |= {"over_limit": figures["ttft_s"] / row.limit_s}
            figures |= ratio("over_fastest", seconds[name], seconds[best])
            if name == best:
                figures["over_query_alone_s"] = figures["ttft_s"] - median(seconds[ALONE])
                figures["place_s"] = _place_s(bench.backend, item)
            figures |= _beside(cell, name, best, figures["ttft_s"]) | every_sample("ttft", seconds[name])
            rows.append(_as_way(row, figures))
        return [*rows, *([self._decode_row(bench, cell, item, conditions)] if cell.decodes else [])]

    def _decode_row(self, bench: Bench, cell: CostCell, item: KVCacheItem, conditions: dict[str, Any]) -> Row:
        """Greedy tokens a second behind the longest memory, the first token's prefill apart."""
        backend = bench.backend
        assert isinstance(backend, HFGraphBackend)
        prompt = backend.template.split(item.metadata.tokens, cell.cell.question)
        rates = []
        for repeat in range(1 + max(REPEATS, self.pairs // 3)):
            logits_V, answer = backend.prefill(prompt, item.kv_cache)  # type: ignore[arg-type]
            token = int(logits_V.argmax())
            started = time.perf_counter()
            made = backend.engine.greedy(answer, token, self.decode_tokens - 1, ())
            if repeat:
                rates.append(len(made) / (time.perf_counter() - started))
        held = len(prompt.ids) + self.decode_tokens // 2
        low, high = ttft.median_interval(rates) or (None, None)
        figures: dict[str, Any] = {
            "context": cell.cell.context,
            "query": cell.cell.query,
            "context_tokens": cell.context_tokens,
            "query_tokens": cell.query_tokens,
            "tokens_a_second": median(rates),
            "low": low,
            "high": high,
            "of_the_limit": median(rates) * bench.limit_s(1, held),
            "tokens_a_second_all": rates,
        }
        if cell.peer is not None:
            figures["vllm_tokens_a_second"] = median(cell.peer.decode_tokens_per_s_all)
        row = bench.row(
            DECODING,
            arm=best_arm(backend),
            context_tokens=cell.context_tokens,
            query_tokens=cell.query_tokens,
            pairs=len(rates),
            limit_s=bench.limit_s(1, held),
            conditions=conditions,
            extra=figures,
            verdict="ok" if figures["of_the_limit"] <= 1 else "invalid",
        )
        return dataclasses.replace(row, verdict_reason="" if row.verdict == "ok" else "it beats the hardware's limit")

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        best = [row for row in rows if row.extra.get("place_s") is not None]
        if not best:
            return ""
        over = between([row.extra["over_limit"] for row in best], " ×")
        parts = [f"The fastest injected way takes {over} the least that this machine needs"]
        if beside := [row.extra["over_vllm_quartile"] for row in best if row.extra.get("over_vllm_quartile")]:
            parts.append(f"{between(beside, ' ×')} vLLM's prefix hit (its lower quartile)")
        direct = [row.extra["over_fastest"] for row in rows if row.arm == DIRECT]
        as_text = f"; the same memory as prompt text takes {between(direct, ' ×')} as long" if direct else ""
        return f"{', '.join(parts)}{as_text}."


def best_arm(backend: HFGraphBackend) -> str:
    """Our fastest way here."""
    return GRAPH if backend.engine.graph_up_to else IN_PLACE


def _row_without_memory(
    bench: Bench,
    cell: CostCell,
    name: str,
    prompt: TokenizedPrompt,
    seconds: Sequence[float],
    conditions: dict[str, Any],
) -> Row:
    limit_s = bench.limit_s(len(prompt.ids), 0)
    beats = median(seconds) < limit_s
    return bench.row(
        InjectionCost.name,
        arm=name,
        context_tokens=cell.context_tokens,
        query_tokens=cell.query_tokens,
        pairs=len(seconds),
        limit_s=limit_s,
        mfu=bench.roofline.mfu(len(prompt.ids), 0, median(seconds)),
        verdict="invalid" if beats else "ok",
        verdict_reason="it beats the hardware's limit" if beats else "",
        conditions=conditions,
    )


def _as_way(row: Row, figures: dict[str, Any]) -> Row:
    """The figures stand in `extra`, for a table of ways; of the user's TTFT nothing was taken."""
    return dataclasses.replace(
        row,
        kv_ttft_s=None,
        direct_ttft_s=None,
        kv_user_ttft_s=None,
        direct_user_ttft_s=None,
        fetch_s=None,
        break_even_queries=None,
        speedup_pct=None,
        speedup_interval=None,
        extra=figures | {key: row.extra[key] for key in ("answers",) if key in row.extra},
    )


def _place_s(backend: HFGraphBackend, item: KVCacheItem) -> float:
    """Median seconds of placing the whole memory into a buffer where another one lies."""
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


def _beside(cell: CostCell, name: str, best: str, ttft_s: float) -> dict[str, float]:
    """vLLM's figures of this cell beside ours: the hit's beside the fastest way, the cold one's beside the direct."""
    peer = cell.peer and cell.peer.cell(cell.context_tokens, cell.query_tokens)
    if not peer or name not in (best, DIRECT):
        return {}
    theirs = peer.hit_all_s if name == best else peer.cold_all_s
    quartile = float(np.percentile(theirs, 25))
    return {"vllm_s": median(theirs), "vllm_quartile_s": quartile, "over_vllm_quartile": ttft_s / quartile}


def _request(bench: Bench, scenario: InjectionCost, cells: Sequence[Cell]) -> vllm_process.Request:
    name, config = bench.setup.model.source(), bench.backend.model_config
    is_random = name.startswith(loading.RANDOM)
    if is_random:
        name = tempfile.mkdtemp(prefix="kvmem-")
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
