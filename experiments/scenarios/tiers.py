"""What does a slower tier cost: what is the TTFT with a memory in each tier, and when is recomputing faster?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.bench import (
    COLD,
    RECOMPUTE,
    Bench,
    Measured,
    Setup,
    TierEvidence,
    TierProbe,
    build_once,
    builds_s,
    compare,
    judged_again,
    reads_file,
)
from experiments.measurement import Witness, embedding_of, transfer_s, ttft
from experiments.results import Evidence, JudgedPayload, Row, between, ttft_of
from experiments.scenarios.base import ModelScenario
from experiments.workloads import Cell, as_query, cut_memories, docs_texts, other_questions
from kvmem.engines import Backend
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError
from kvmem.scheduler import Costs
from kvmem.storage import TemporaryFolder
from kvmem.tiers import check_hqq


@plain_dataclass(frozen=True)
class TiersCell:
    """All lengths in one cell, because a break-even length is computed from all of them."""

    label: str


@plain_dataclass(frozen=True, kw_only=True)
class TiersPayload(JudgedPayload):
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
        "agreement_pct",
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
    agreement_pct: float | None = None
    """The share of the scored tokens for which the most likely token is the exact memory's."""
    lossy: str | None = None
    """The tier's quantization, such as int8; None if the tier is exact."""
    resident: str = ""
    """The arm of the fastest tier."""

    def from_calls(self, row: Row, evidence: Evidence) -> dict[str, float | None]:
        arm_s, resident_s, recompute_s = (
            median(call.user_s for call in evidence.calls if call.arm == arm)
            for arm in (row.arm, self.resident, RECOMPUTE)
        )
        fetches_s = [call.cache_s for call in evidence.calls if call.arm == row.arm]
        return {
            "ttft_s": arm_s,
            "over_resident": arm_s / resident_s,
            "saved_pct": 100 * (1 - arm_s / recompute_s),
            "fetch_s": None if self.fetch_s is None else median(fetches_s),
            "nll_above_built": evidence.loss.nll_above if evidence.loss else None,
            "agreement_pct": evidence.loss.agreement_pct if evidence.loss else None,
        }

    @property
    def may_diverge(self) -> bool:
        return self.lossy is not None


@dataclass(config=ConfigDict(extra="forbid"))
class Tiers(ModelScenario[TiersCell]):
    """Stores one memory of each length in every tier. Each tier answers the same prompt once a round, in random order.

    TTFT is measured from the prompt's token ids to the first token on the host. It includes the load from the tier.
    Warm means that the file is in the page cache. Cold means that it was dropped from the page cache just before;
    `cached_pct` is the share that could not be dropped.

    Each arm is judged against recomputing by the rules of `kv_vs_direct`, with another question of the same length in
    each round.

    A compressed tier is lossy. Its answer is graded against that of recomputing. `nll` is the mean negative
    log-likelihood (nats a token) of the memory's last 64 tokens, given its KV cache. The exact memory's is in the row
    of the fastest tier. A tier that loses more than its scheme states (`experiments/bench/quality.py`) is invalid.
    """

    context_tokens: Annotated[list[PositiveInt], Field(min_length=2)] = field(
        default_factory=lambda: [128, 512, 1024, 2048]
    )
    repeats: int = Field(default=6, ge=1)
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
        with TemporaryFolder("kvmem-tiers-", Path(self.folder)) as folder:
            lengths = [self._measure_length(bench, i, tokens, folder) for i, tokens in enumerate(self.context_tokens)]
        costs = _costs(bench, lengths)
        even = {tier: break_even_tokens(costs, lengths, tier) for tier in lengths[0].seconds if tier != RECOMPUTE}
        return [self._row(length, tier, row, even.get(tier)) for length in lengths for tier, row in length.rows.items()]

    def _measure_length(self, bench: Bench, i: int, tokens: int, folder: Path) -> LengthTimes:
        texts = docs_texts(bench.setup.seed, i, 1)
        template = bench.backend.template
        (text,) = cut_memories(texts.memories, tokens, template, bench.setup.separator, "scenario")
        item = build_once(bench, text)
        question = as_query(template, texts.question_for(()).variants[0])
        questions = other_questions(template, item.metadata.tokens, question, self.repeats, bench.setup.seed)
        probe = TierProbe(bench, item, questions, folder / str(tokens), self.compressed)
        try:
            return self._measure_tiers(bench, probe, questions, text)
        finally:
            probe.close()

    def _measure_tiers(self, bench: Bench, probe: TierProbe, questions: Sequence[str], text: str) -> LengthTimes:
        rounds = [questions[i % len(questions)] for i in range(self.repeats)]
        with Witness.of(embedding_of(bench.backend)) as witness:
            samples, runs = ttft.interleaved_calm(probe.arms, rounds, random.Random(bench.setup.seed), witness=witness)
        kept = [*probe.tier_of, RECOMPUTE]
        measured = Measured(
            samples,
            {arm: probe.trace(arm, self.answer_tokens) for arm in kept},
            runs,
            len(questions) == 1 < self.repeats,
            bench.conditions_now(),
            {name: arm.calls for name, arm in probe.arms.items()},
        )
        item = probe.item
        tokens, query_tokens = item.metadata.token_count, len(probe.prompt.query_ids)
        cell = Cell("", tokens, "", query_tokens, (text,), questions[0])
        rows = {}
        for arm in kept:
            evidence = TierEvidence(
                probe.loss(arm),
                probe.kv_off_built(arm),
                probe.nbytes(arm) / bench.roofline.rates.bytes_per_s if reads_file(arm) else None,
            )
            rows[arm] = compare(
                bench,
                self.name,
                cell,
                arm,
                measured,
                items=[item],
                builds_s=builds_s(bench, [item]),
                direct=RECOMPUTE,
                beside=(probe.resident,),
                tier=evidence,
            )
        timed = slice(-self.repeats, None)  # the rounds that count
        return LengthTimes(
            tokens,
            query_tokens,
            item.metadata.kv_bytes,
            {arm: [sample.user_s for sample in samples[arm]] for arm in kept},
            cached_pct=max(probe.cached_pct[timed]),
            read_s={arm: median(read_s[timed]) for arm, read_s in probe.read_s.items()},
            transfer_s=transfer_s(item.metadata.kv_bytes, bench.backend.device),
            nbytes={arm: probe.nbytes(arm) for arm in kept},
            exact_nll=probe.exact_score.nll if probe.exact_score else None,
            rows=rows,
        )

    def _row(self, length: LengthTimes, tier: str, row: Row, even: int | None) -> Row:
        """The row of `tier` with this scenario's figures; `row` has those that it is judged by."""
        figures = ttft_of(row)
        assert figures is not None and figures.evidence is not None
        ttft_s, loss = length.ttft_s(tier), figures.evidence.loss
        nll = length.exact_nll if tier == length.resident else None
        if loss and loss.nll_above is not None and length.exact_nll is not None:
            nll = length.exact_nll + loss.nll_above
        read_s, fetch_s = length.read_s.get(tier), figures.fetch_s if reads_file(tier) else None
        payload = TiersPayload(
            memory_tokens=length.tokens,
            kv_bytes=length.nbytes[tier],
            ttft_s=ttft_s,
            over_resident=ttft_s / length.ttft_s(length.resident),
            saved_pct=100 * (1 - ttft_s / length.ttft_s(RECOMPUTE)),
            fetch_s=fetch_s,
            read_s=read_s,
            of_read_pct=100 * read_s / fetch_s if read_s is not None and fetch_s else None,
            cached_pct=length.cached_pct if tier == COLD else None,
            transfer_s=length.transfer_s,
            break_even_tokens=even,
            ttft_all_s=length.seconds[tier],
            nll=nll,
            nll_above_built=loss.nll_above if loss else None,
            agreement_pct=loss.agreement_pct if loss else None,
            lossy=loss.method if loss else None,
            judged=figures,
            resident=length.resident,
            refers_to={arm: str(length.rows[arm].verdict) for arm in (length.resident, RECOMPUTE) if arm != tier},
        )
        return judged_again(replace(row, arm=tier, tier=tier.partition(",")[0], payload=payload))

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
    cached_pct: float = 0.0
    read_s: dict[str, float] = field(default_factory=dict)
    transfer_s: float | None = None
    nbytes: dict[str, int] = field(default_factory=dict)
    """The size of the memory in each tier."""
    exact_nll: float | None = None
    """Of the memory before quantization."""
    rows: dict[str, Row] = field(default_factory=dict)
    """The comparison of each arm with recomputing, judged."""

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
