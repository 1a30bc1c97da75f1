"""What does a slower tier cost: TTFT with a memory in each, beside prefilling it anew, and the break-even?"""

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

from experiments.bench import COLD, RECOMPUTE, WARM, Bench, Quality, TierProbe
from experiments.measurement import transfer_s
from experiments.results import Payload, Row, between
from experiments.scenarios.base import ModelScenario
from experiments.workloads import as_query, cut_memories, docs_texts
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError
from kvmem.scheduler import Costs
from kvmem.tiers import check_hqq


@plain_dataclass(frozen=True)
class TiersCell:
    """All lengths together, for a break-even is found across them."""

    label: str


@plain_dataclass(frozen=True, kw_only=True)
class TiersPayload(Payload):
    """One memory length, answered from one tier. Seconds are medians over the rounds."""

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
    """In this tier: a quantized one is smaller."""
    ttft_s: float
    over_resident: float
    """ttft_s over that of a memory in the fastest tier."""
    saved_pct: float
    """100 × (1 − ttft_s / TTFT of recomputing the memory)."""
    fetch_s: float | None = None
    """From the disk tiers: opening the file until its tensors can be used."""
    read_s: float | None = None
    """Reading the same file alone, in the same state of the page cache."""
    of_read_pct: float | None = None
    cached_pct: float | None = None
    """How much of a cold file was still in the page cache."""
    transfer_s: float | None = None
    """One copy of the memory's bytes from pinned host memory to the GPU."""
    break_even_tokens: int | None = None
    """The memory length from which loading beats recomputing; None: no measured length."""
    ttft_all_s: list[float]
    nll: float | None = None
    """Mean negative log-likelihood of the memory's last tokens behind its KV, in nats a token."""
    nll_above_built: float | None = None
    """nll above that of the memory as it was built."""
    lossy: str | None = None
    """The quantization of the tier, such as int8; None: the tier is exact."""

    @property
    def may_diverge(self) -> bool:
        return self.lossy is not None


@dataclass(config=ConfigDict(extra="forbid"))
class Tiers(ModelScenario[TiersCell]):
    """For each length one memory in every tier; each place answers the same prompt once a round, in random order.

    A TTFT runs from the prompt's token ids to the first token on the host, and holds what the tier takes to bring the
    bytes. Warm: the file is in the page cache; cold: it was taken out just before (`cached` says how much was left).

    A compressed tier is lossy: its answer is graded against the prompt's, and `nll` is the mean negative log-likelihood
    (nats a token) of the memory's last 64 tokens behind its KV; the resident memory's stands in its own row.
    """

    context_tokens: Annotated[list[PositiveInt], Field(min_length=2)] = field(
        default_factory=lambda: [128, 512, 1024, 2048]
    )
    repeats: int = Field(default=5, ge=1)
    compressed: list[str] = field(default_factory=lambda: ["disk_int8", "disk_int4"])
    """Tiers that lose, beside the exact ones; their files are in the page cache. []: none, and no hqq needed."""
    answer_tokens: int = Field(default=16, ge=1)
    """Greedy tokens by which an answer from a compressed tier is graded."""
    folder: str = "outputs"
    """Where the disk tier is, and removed again: choose the disk that memories will live on."""

    name: ClassVar[str] = "tiers"
    question: ClassVar[str] = (
        "What does a slower tier cost: TTFT with a memory in each, beside prefilling it anew, and the break-even?"
    )

    def cells(self, bench: Bench) -> Sequence[TiersCell]:
        if not isinstance(bench.backend, HFBackend):
            raise ConfigError(
                f"scenario=tiers needs the tiers of a Hugging Face engine, and backend={type(bench.backend).name} has "
                "its own. Use backend=huggingface."
            )
        if self.compressed:
            try:
                check_hqq()
            except ConfigError as error:
                raise ConfigError(f"{error} Or leave those tiers out: scenario.compressed=[].") from error
        return [TiersCell(f"{len(self.context_tokens)} lengths in every tier")]

    def measure(self, bench: Bench, cell: TiersCell) -> list[Row]:
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="kvmem-tiers-", dir=self.folder) as folder:
            lengths = [self._length(bench, i, tokens, Path(folder)) for i, tokens in enumerate(self.context_tokens)]
        costs = _costs(bench, lengths)
        conditions = bench.conditions_now()
        even = {place: break_even_tokens(costs, lengths, place) for place in lengths[0].seconds if place != RECOMPUTE}
        return [
            self._row(bench, length, place, even.get(place), conditions)
            for length in lengths
            for place in length.seconds
        ]

    def _length(self, bench: Bench, i: int, tokens: int, folder: Path) -> Length:
        texts = docs_texts(bench.setup.seed, i, 1)
        template = bench.backend.template
        (text,) = cut_memories(texts.memories, tokens, template, bench.setup.separator, "scenario")
        bench.memory.extract(text)  # warms up this shape
        item = bench.memory.extract(text)
        question = as_query(template, texts.question_for(()).variants[0])
        places = TierProbe(bench, item, question, folder / str(tokens), self.compressed)
        rng = random.Random(bench.setup.seed)
        rounds = [places.round(rng) for _ in range(1 + self.repeats)][1:]
        seconds = {place: [taken[place].seconds for taken in rounds] for place in rounds[0]}
        exact = [place for place in seconds if place not in self.compressed]
        tokens_of = {taken[place].token for taken in rounds for place in exact}
        length = Length(
            tokens,
            len(places.prompt.query_ids),
            item.metadata.kv_bytes,
            seconds,
            cached_pct=max(taken[COLD].cached_pct for taken in rounds),
            read_s={place: median(taken[place].read_s for taken in rounds) for place in (COLD, WARM)},
            fetch_s={
                place: median(taken[place].fetch_s for taken in rounds) for place in (COLD, WARM, *self.compressed)
            },
            transfer_s=transfer_s(item.metadata.kv_bytes, bench.backend.device),
            wrong=places.wrong(len(tokens_of)),
            quality=places.quality(self.answer_tokens) if self.compressed else {},
            lossy_bytes={place: places.nbytes(place) for place in self.compressed},
            nll=places.nll(),
        )
        places.close()
        return length

    def _row(self, bench: Bench, length: Length, place: str, even: int | None, conditions: dict[str, Any]) -> Row:
        ttft_s = length.ttft_s(place)
        on_disk = place in (COLD, WARM)
        quality = length.quality.get(place)
        kv_bytes = length.lossy_bytes.get(place, length.kv_bytes)
        equality = quality.equality.grade if quality else "diverged" if length.wrong else "bitwise"
        of_resident = length.nll if place == length.resident else None
        nll = quality.nll if quality else of_resident
        payload = TiersPayload(
            memory_tokens=length.tokens,
            kv_bytes=kv_bytes,
            ttft_s=ttft_s,
            over_resident=ttft_s / length.ttft_s(length.resident),
            saved_pct=100 * (1 - ttft_s / length.ttft_s(RECOMPUTE)),
            fetch_s=length.fetch_s.get(place),
            read_s=length.read_s.get(place),
            of_read_pct=100 * length.read_s[place] / length.fetch_s[place] if on_disk else None,
            cached_pct=length.cached_pct if place == COLD else None,
            transfer_s=length.transfer_s,
            break_even_tokens=even,
            ttft_all_s=length.seconds[place],
            nll=nll,
            nll_above_built=nll - length.nll if quality and nll is not None and length.nll is not None else None,
            lossy=place.removeprefix("disk_") if quality else None,
        )
        return bench.row(
            self.name,
            arm=place,
            tier=place.partition(",")[0],
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
            f"{place} ({between(values)})"
            for place, values in over.items()
            if place != RECOMPUTE and set(values) != {1.0}
        )
        recomputed = f"; prefilled anew ({between(over[RECOMPUTE])})" if RECOMPUTE in over else ""
        return f"Time to the first token, as a multiple of a memory's in the fastest tier: {multiples}{recomputed}."


@plain_dataclass(frozen=True)
class Length:
    """What was measured for one length, by place."""

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
    """Of the memory as it was built."""

    @property
    def resident(self) -> str:
        """The fastest tier's name: the first place."""
        return next(iter(self.seconds))

    def ttft_s(self, place: str) -> float:
        return median(self.seconds[place])


def _costs(bench: Bench, lengths: Sequence[Length]) -> Costs:
    """What prefilling takes here, from what was measured with the memory resident and with nothing cached."""
    samples = []
    for length in lengths:
        samples.append((length.query_tokens, length.tokens, length.ttft_s(length.resident)))
        samples.append((length.tokens + length.query_tokens, 0, length.ttft_s(RECOMPUTE)))
    return Costs.fitted(samples, lengths[0].kv_bytes // lengths[0].tokens)


def break_even_tokens(costs: Costs, lengths: Sequence[Length], place: str) -> int | None:
    """From which memory length on a load from `place` is faster than prefilling it anew; None: from none measured.

    The load's seconds above a resident memory's TTFT are a straight line over length, fitted; below what was measured
    it is that line.
    """
    tokens = np.array([length.tokens for length in lengths], dtype=float)
    above_s = np.array([length.ttft_s(place) - length.ttft_s(length.resident) for length in lengths])
    slope, fixed = np.polyfit(tokens, above_s, 1)
    every = np.arange(1, int(tokens.max()) + 1)
    pays = costs.saved_s(every, lengths[0].query_tokens) > np.maximum(fixed + slope * every, 0.0)
    if not pays[-1]:
        return None
    return int(every[np.flatnonzero(~pays)[-1]] + 1) if not pays.all() else 1
