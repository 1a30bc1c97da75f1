"""What does a slower tier cost: what is the TTFT with a memory in each tier, and when is recomputing faster?"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.bench import COLD, RECOMPUTE, WARM, Bench, Quality, Setup, TierProbe
from experiments.measurement import transfer_s
from experiments.results import Payload, Row, between
from experiments.scenarios.base import ModelScenario
from experiments.workloads import as_query, cut_memories, docs_texts
from kvmem.engines import Backend
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError
from kvmem.scheduler import Costs
from kvmem.tiers import check_hqq


@plain_dataclass(frozen=True)
class TiersCell:
    """All lengths in one cell, because a break-even length is computed from all of them."""

    label: str


@plain_dataclass(frozen=True, kw_only=True)
class TiersPayload(Payload):
    """One memory length in one tier. Seconds are medians over the rounds."""

    name: ClassVar[str] = "tiers"
    columns: ClassVar[tuple[str, ...]] = (
        "memory_tokens",
        "kv_bytes",
        "ttft_s",
        "over_resident",
        "saved_pct",
        "fetch_s",
        "read_s",
        "of_read_pct",
        "cached_pct",
        "transfer_s",
        "break_even_tokens",
        "equality",
        "nll",
        "nll_above_built",
        "lossy",
    )

    memory_tokens: int
    kv_bytes: int
    """The size in this tier. A quantized tier needs fewer bytes."""
    ttft_s: float
    over_resident: float
    """ttft_s divided by the TTFT with a memory in the fastest tier."""
    saved_pct: float
    """100 × (1 − ttft_s / TTFT of recomputing the memory)."""
    fetch_s: float | None = None
    """Disk tiers: seconds from opening the file until its tensors can be used."""
    read_s: float | None = None
    """Disk tiers: seconds of only reading the same file, in the same state of the page cache."""
    of_read_pct: float | None = None
    """100 × read_s / fetch_s."""
    cached_pct: float | None = None
    """The share of a cold file that was still in the page cache, in percent."""
    transfer_s: float | None = None
    """Seconds of copying the memory from pinned host memory to the GPU."""
    break_even_tokens: int | None = None
    """The memory length from which loading is faster than recomputing; None if it is slower at the longest length."""
    ttft_all_s: list[float]
    nll: float | None = None
    """Mean negative log-likelihood of the memory's last tokens, given its KV cache, in nats a token."""
    nll_above_built: float | None = None
    """nll minus that of the memory before quantization."""
    lossy: str | None = None
    """The tier's quantization, such as int8; None if the tier is exact."""

    @property
    def may_diverge(self) -> bool:
        return self.lossy is not None


@dataclass(config=ConfigDict(extra="forbid"))
class Tiers(ModelScenario[TiersCell]):
    """Stores one memory of each length in every tier. Each tier answers the same prompt once a round, in random order.

    TTFT is measured from the prompt's token ids to the first token on the host. It includes the load from the tier.
    Warm means that the file is in the page cache. Cold means that it was dropped from the page cache just before;
    `cached_pct` is the share that could not be dropped.

    A compressed tier is lossy. Its answer is graded against the direct arm's. `nll` is the mean negative log-likelihood
    (nats a token) of the memory's last 64 tokens, given its KV cache. The exact memory's is in the row of the fastest
    tier.
    """

    context_tokens: Annotated[list[PositiveInt], Field(min_length=2)] = field(
        default_factory=lambda: [128, 512, 1024, 2048]
    )
    repeats: int = Field(default=5, ge=1)
    compressed: list[str] = field(default_factory=lambda: ["disk_int8", "disk_int4"])
    """Lossy tiers to measure besides the exact ones. Their files are in the page cache. [] needs no hqq."""
    answer_tokens: int = Field(default=16, ge=1)
    """The number of greedy tokens that grade an answer from a compressed tier."""
    folder: str = "outputs"
    """The folder of the disk tier, on the disk to be measured. Its files are removed afterwards."""

    engines: ClassVar[tuple[type[Backend], ...]] = (HFBackend,)
    measures_workload: ClassVar[bool] = False
    name: ClassVar[str] = "tiers"
    question: ClassVar[str] = (
        "What does a slower tier cost: what is the TTFT with a memory in each tier, and when is recomputing faster?"
    )

    def check(self, setup: Setup) -> None:
        super().check(setup)
        if self.compressed:
            try:
                check_hqq()
            except ConfigError as error:
                raise ConfigError(f"{error} Or leave those tiers out: scenario.compressed=[].") from error

    def cells(self, bench: Bench) -> Sequence[TiersCell]:
        return [TiersCell(f"{len(self.context_tokens)} lengths in every tier")]

    def measure(self, bench: Bench, cell: TiersCell) -> list[Row]:
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="kvmem-tiers-", dir=self.folder) as folder:
            lengths = [
                self._measure_length(bench, i, tokens, Path(folder)) for i, tokens in enumerate(self.context_tokens)
            ]
        costs = _costs(bench, lengths)
        conditions = bench.conditions_now()
        even = {tier: break_even_tokens(costs, lengths, tier) for tier in lengths[0].seconds if tier != RECOMPUTE}
        return [
            self._row(bench, length, tier, even.get(tier), conditions) for length in lengths for tier in length.seconds
        ]

    def _measure_length(self, bench: Bench, i: int, tokens: int, folder: Path) -> LengthTimes:
        texts = docs_texts(bench.setup.seed, i, 1)
        template = bench.backend.template
        (text,) = cut_memories(texts.memories, tokens, template, bench.setup.separator, "scenario")
        bench.memory.extract(text)  # warms up this shape
        item = bench.memory.extract(text)
        question = as_query(template, texts.question_for(()).variants[0])
        probe = TierProbe(bench, item, question, folder / str(tokens), self.compressed)
        rng = random.Random(bench.setup.seed)
        rounds = [probe.round(rng) for _ in range(1 + self.repeats)][1:]
        seconds = {tier: [loads[tier].seconds for loads in rounds] for tier in rounds[0]}
        exact = [tier for tier in seconds if tier not in self.compressed]
        first_tokens = {loads[tier].token for loads in rounds for tier in exact}
        length = LengthTimes(
            tokens,
            len(probe.prompt.query_ids),
            item.metadata.kv_bytes,
            seconds,
            cached_pct=max(loads[COLD].cached_pct for loads in rounds),
            read_s={tier: median(loads[tier].read_s for loads in rounds) for tier in (COLD, WARM)},
            fetch_s={tier: median(loads[tier].fetch_s for loads in rounds) for tier in (COLD, WARM, *self.compressed)},
            transfer_s=transfer_s(item.metadata.kv_bytes, bench.backend.device),
            wrong=probe.wrong(len(first_tokens)),
            quality=probe.quality(self.answer_tokens) if self.compressed else {},
            lossy_bytes={tier: probe.nbytes(tier) for tier in self.compressed},
            nll=probe.nll(),
        )
        probe.close()
        return length

    def _row(self, bench: Bench, length: LengthTimes, tier: str, even: int | None, conditions: dict[str, Any]) -> Row:
        ttft_s = length.ttft_s(tier)
        on_disk = tier in (COLD, WARM)
        quality = length.quality.get(tier)
        kv_bytes = length.lossy_bytes.get(tier, length.kv_bytes)
        equality = quality.equality.grade if quality else "diverged" if length.wrong else "bitwise"
        of_resident = length.nll if tier == length.resident else None
        nll = quality.nll if quality else of_resident
        payload = TiersPayload(
            memory_tokens=length.tokens,
            kv_bytes=kv_bytes,
            ttft_s=ttft_s,
            over_resident=ttft_s / length.ttft_s(length.resident),
            saved_pct=100 * (1 - ttft_s / length.ttft_s(RECOMPUTE)),
            fetch_s=length.fetch_s.get(tier),
            read_s=length.read_s.get(tier),
            of_read_pct=100 * length.read_s[tier] / length.fetch_s[tier] if on_disk else None,
            cached_pct=length.cached_pct if tier == COLD else None,
            transfer_s=length.transfer_s,
            break_even_tokens=even,
            ttft_all_s=length.seconds[tier],
            nll=nll,
            nll_above_built=nll - length.nll if quality and nll is not None and length.nll is not None else None,
            lossy=tier.removeprefix("disk_") if quality else None,
        )
        return bench.row(
            self.name,
            arm=tier,
            tier=tier.partition(",")[0],
            context_tokens=length.tokens,
            query_tokens=length.query_tokens,
            pairs=self.repeats,
            equality=equality,
            first_difference=quality.equality.first_difference if quality else None,
            logit_max_abs_diff=quality.equality.logit_max_abs_diff if quality else None,
            verdict="invalid" if length.wrong else "ok",
            verdict_reason=length.wrong,
            conditions=conditions,
            payload=payload,
        )

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        over: dict[str, list[float]] = {}
        for row in rows:
            if isinstance(row.payload, TiersPayload):
                over.setdefault(row.arm, []).append(row.payload.over_resident)
        multiples = ", ".join(
            f"{tier} ({between(values)})" for tier, values in over.items() if tier != RECOMPUTE and set(values) != {1.0}
        )
        recomputed = f"; recomputed ({between(over[RECOMPUTE])})" if RECOMPUTE in over else ""
        return f"TTFT as a multiple of that with a memory in the fastest tier: {multiples}{recomputed}."


@plain_dataclass(frozen=True)
class LengthTimes:
    """The measurements of one memory length, by tier."""

    tokens: int
    query_tokens: int
    kv_bytes: int
    seconds: dict[str, list[float]]
    cached_pct: float
    read_s: dict[str, float]
    fetch_s: dict[str, float]
    transfer_s: float | None
    wrong: str
    quality: dict[str, Quality] = field(default_factory=dict)
    lossy_bytes: dict[str, int] = field(default_factory=dict)
    nll: float | None = None
    """Of the memory before quantization."""

    @property
    def resident(self) -> str:
        """The name of the fastest tier, which is measured first."""
        return next(iter(self.seconds))

    def ttft_s(self, tier: str) -> float:
        return median(self.seconds[tier])


def _costs(bench: Bench, lengths: Sequence[LengthTimes]) -> Costs:
    """The cost model of a prefill, fitted to the TTFTs with a resident memory and with nothing cached."""
    samples = []
    for length in lengths:
        samples.append((length.query_tokens, length.tokens, length.ttft_s(length.resident)))
        samples.append((length.tokens + length.query_tokens, 0, length.ttft_s(RECOMPUTE)))
    return Costs.fitted(samples, lengths[0].kv_bytes // lengths[0].tokens)


def break_even_tokens(costs: Costs, lengths: Sequence[LengthTimes], tier: str) -> int | None:
    """The memory length from which a load from `tier` is faster than recomputing the memory.

    The seconds of a load above a resident memory's TTFT are fitted as a linear function of the length. Returns None if
    recomputing is faster at the longest measured length.
    """
    tokens = np.array([length.tokens for length in lengths], dtype=float)
    above_s = np.array([length.ttft_s(tier) - length.ttft_s(length.resident) for length in lengths])
    slope, fixed = np.polyfit(tokens, above_s, 1)
    every = np.arange(1, int(tokens.max()) + 1)
    pays = costs.saved_s(every, lengths[0].query_tokens) > np.maximum(fixed + slope * every, 0.0)
    if not pays[-1]:
        return None
    return int(every[np.flatnonzero(~pays)[-1]] + 1) if not pays.all() else 1
