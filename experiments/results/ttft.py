"""Figures that several scenarios share: the two answers of a cell, and the TTFT of a memory against its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple, Protocol

from experiments.results.row import Payload, Row, TimedPrefill

Interval = tuple[float, float]


class ArmTimes(NamedTuple):
    """Engine TTFT of one arm in seconds: its median, every sample, and the hardware's limit."""

    ttft_s: float
    samples_s: Sequence[float]
    limit_s: float | None


@dataclass(frozen=True, kw_only=True)
class TimedCall:
    """One timed first token of one arm in one round: what it took, what it returned, and what a witness saw.

    `outer_s` is the clock around the whole call, `user_s` and `engine_s` are the arm's own. A rule can be applied again
    to a stored row from these alone.
    """

    arm: str
    round: int
    started_s: float
    """Since the first call of the cell."""
    outer_s: float
    user_s: float
    engine_s: float
    cache_s: float = 0.0
    split_s: float | None = None
    """The part of `user_s` that makes token ids of the text; None where it is not timed apart."""
    token: int
    prompt_tokens: int
    digest: str
    """Of the token ids of the prompt."""
    cached_tokens: int = 0
    """Tokens that were not computed, by the arm's own account."""
    expected_tokens: int = 0
    computed_tokens: int | None = None
    """Tokens that entered the model, by a hook outside the engine; None where no hook can be set."""
    products_tokens: int | None = None
    """Tokens that passed through every layer's matrix products in one more call of the same prompt, counted by torch
    itself; None where a hook counts them, and in all rounds but the first."""
    products_apart: float | None = None
    """The largest difference of that call's logits from this one's."""
    logits_apart: float | None = None
    """The largest difference of this call's logits from the direct arm's in the same round."""
    ordinal: int | None = None
    """The number of this call among all calls of its arm, from 1, warm-up included; None in rows without this count."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a method that is not exact loses, measured, and how much of it the method states beforehand.

    The likelihood and the agreement are of next tokens of the memory's own text, given its KV as the method gives it.
    They tell nothing about a model with random weights.
    """

    method: str
    kv_off: float
    """The largest relative distance of a token's keys or values from the exact memory's."""
    most_kv_off: float
    nll_above: float | None
    """Mean negative log-likelihood above the exact memory's, in nats a token; None: too few tokens to score."""
    most_nll_above: float
    agreement_pct: float | None
    """The share of the scored tokens for which the most likely token is the exact memory's."""
    least_agreement_pct: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the rules of a verdict are applied to, beside the figures: `experiments/measurement/verdict.py`."""

    calls: list[TimedCall] = field(default_factory=list)
    """Every timed call, in order of time."""
    calls_made: dict[str, int] = field(default_factory=dict)
    """How often each arm was called in the cell, warm-up and discarded rounds included."""
    exact: bool = True
    """Whether the injection promises the output of the prompt sent whole."""
    direct_arm: str = "direct"
    first_token_margins: dict[str, float] = field(default_factory=dict)
    """By how much the logits of an arm's graded answer prefer its first token to the first timed one; 0: the same."""
    rounding_noise: float | None = None
    """The largest difference of a logit between two executions of the independent forward pass."""
    tolerance: float | None = None
    """The largest difference of a logit that rounding explains."""
    direct_off_reference: float | None = None
    """The largest distance of the direct arm's logits from the independent forward pass's."""
    injected_off_reference: float | None = None
    kv_off_reference: float | None = None
    """The largest relative distance of a token's stored keys or values from the independent forward pass's."""
    kv_tolerance: float | None = None
    kv_scale_off: float | None = None
    """How far from 1 the factor is that fits the independent forward pass's keys or values to the stored ones, in the
    worst layer."""
    kv_scale_tolerance: float | None = None
    view_off_stored: float | None = None
    """The largest difference of a number between the stored memory and the view that an answer is given."""
    reference: str = ""
    """What the independent forward pass is."""
    build_all_s: list[float] = field(default_factory=list)
    """Every build of the memories that was measured; `build_s` is their median."""
    written_bytes: int = 0
    """Bytes of the files whose writing the seconds of a build include; 0 for an engine that builds in memory."""
    loss: Loss | None = None
    """What an arm that states a loss lost; None for others."""
    kv_off_built: float | None = None
    """The largest relative distance of a token's KV, as a tier gave it back, from what was stored there."""
    least_fetch_s: float | None = None
    """Seconds in which this machine can read the bytes that a fetch reads; None where a fetch reads none."""
    most_over_baseline: float | None = None
    """How long the direct arm may take over the baseline, where it is not an independent forward pass."""
    peer_arm: str = ""
    """The engine's own entry point, timed in the same rounds, that an arm without us may not be slower than."""
    slack_s: float = 0.0
    """Seconds that the arms' way to the engine may cost beside that of the baseline and the peer."""
    same_query: bool = False
    """Whether every round had the same query, because no other of the same length was found."""


@dataclass(frozen=True, kw_only=True)
class AnswerPayload(Payload):
    """What was asked, and what each arm answered."""

    question: str | None = None
    truth: str | None = None
    """The fact that a correct answer states, if the workload knows one."""
    answers: dict[str, str] = field(default_factory=dict)
    """The greedy answers by arm: "injected" and "direct"."""


@dataclass(frozen=True, kw_only=True)
class TTFTPayload(AnswerPayload):
    """An arm that reuses a memory (`kv_…`), against the whole prompt computed from its text (`direct_…`).

    Engine TTFT (`kv_ttft_s`, `direct_ttft_s`) runs from token ids ready to the first token id on the host; user TTFT
    runs from text to the same point. Both are medians over the row's interleaved pairs.
    """

    build_s: float
    kv_bytes: int
    fetch_s: float | None = None
    """Getting one memory's cache; None if several are merged."""
    merge_s: float | None = None
    kv_ttft_s: float
    direct_ttft_s: float
    kv_user_ttft_s: float
    direct_user_ttft_s: float
    speedup_pct: float
    """100 × (1 − the median of injected / direct over the pairs), engine TTFT."""
    speedup_interval: Interval | None = None
    """96.9% interval of `speedup_pct` over the pairs; None for fewer than 6."""
    break_even_queries: float | None = None
    """Queries after which the build has paid for itself: build_s over the user TTFT saved; None: never."""
    cached_tokens: int
    limit_s: float | None = None
    """The roofline's least time for the injected arm."""
    direct_limit_s: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation of the injected arm: FLOP / (kv_ttft_s × the calibrated rate)."""
    measured_times: int | None = None
    """How often all rounds were run: twice if an arm was disturbed the first time."""
    spread: dict[str, float] = field(default_factory=dict)
    """Interquartile range over median, by arm."""
    kv_ttft_all_s: list[float] = field(default_factory=list)
    direct_ttft_all_s: list[float] = field(default_factory=list)
    kv_ttft_p90_s: float | None = None
    direct_ttft_p90_s: float | None = None
    baseline_ttft_s: float | None = None
    """The whole prompt by the independent forward pass, timed in the same rounds."""
    query_alone_s: float | None = None
    """The query's tokens alone, by the same engine: the floor of every injection."""
    evidence: Evidence | None = None
    """What the verdict was judged by; None in rows of older rules."""

    @property
    def kv_arm(self) -> ArmTimes:
        return ArmTimes(self.kv_ttft_s, self.kv_ttft_all_s, self.limit_s)

    @property
    def direct_arm(self) -> ArmTimes:
        return ArmTimes(self.direct_ttft_s, self.direct_ttft_all_s, self.direct_limit_s)

    def prefills(self, row: Row) -> list[TimedPrefill]:
        total = row.context_tokens + row.query_tokens
        moved_bytes = float(self.kv_bytes) if row.arm == "injected" and row.tier == "cpu" else 0.0
        return [
            TimedPrefill(row.arm, total - self.cached_tokens, self.cached_tokens, moved_bytes, self.kv_ttft_s),
            TimedPrefill("direct", total, 0, 0.0, self.direct_ttft_s),
        ]


class Timed(Protocol):
    """Two arms that were timed in the same rounds: one of ours and the one that it is compared with."""

    @property
    def kv_arm(self) -> ArmTimes: ...

    @property
    def direct_arm(self) -> ArmTimes: ...

    @property
    def measured_times(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Two arms of something that is no first token, such as writing a file."""

    arm: str
    evidence: Evidence
    least_s: float
    """The least seconds in which this machine can do the work of either arm."""
    measured_times: int | None = None

    @property
    def kv_arm(self) -> ArmTimes:
        return self._times(self.arm)

    @property
    def direct_arm(self) -> ArmTimes:
        return self._times(self.evidence.direct_arm)

    def _times(self, arm: str) -> ArmTimes:
        seconds = [call.engine_s for call in self.evidence.calls if call.arm == arm]
        return ArmTimes(median(seconds), seconds, self.least_s)


@dataclass(frozen=True, kw_only=True)
class TimedPayload(Payload):
    """Figures of a scenario that times something else than first tokens."""

    timings: list[Timing] = field(default_factory=list)
    """What the verdict is given by; empty in rows of older rules."""

    def remarks(self) -> list[str]:
        """What a reader of a valid row should know."""
        return []

    def from_calls(self) -> dict[str, float]:
        """The figures that follow from the timed calls, computed again from them, by name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class DerivedPayload(Payload):
    """Figures that follow from what the row stores, and rules of its scenario beside those of every row."""

    refers_to: dict[str, str] = field(default_factory=dict)
    """The verdicts of other arms or rows that figures of this row are made from, by their names."""

    def recomputed(self, row: Row) -> dict[str, float | None]:
        """The figures that follow from what the row stores beside them, computed again from it, by name."""
        return {}

    def failures(self, row: Row) -> list[str]:
        """The rules of this scenario that the row breaks, which makes it invalid."""
        return []

    def remarks(self) -> list[str]:
        """What a reader of a valid row should know."""
        return []


@dataclass(frozen=True, kw_only=True)
class JudgedPayload(DerivedPayload):
    """Figures of a scenario whose arms are judged by the rules of an arm's TTFT against the direct arm's."""

    judged: TTFTPayload | None = None
    """The arm's TTFTs, with the calls that its verdict is given by; None in rows of older rules."""

    def from_calls(self, row: Row, evidence: Evidence) -> dict[str, float | None]:
        """The figures of this payload that follow from the timed calls, computed again from them, by name."""
        return {}


def judged_figures(row: Row) -> TTFTPayload | None:
    """The TTFT figures that a row is judged by; None if it has none."""
    return row.payload.judged if isinstance(row.payload, JudgedPayload) else ttft_of(row)


def ttft_of(row: Row) -> TTFTPayload | None:
    """The TTFT figures of a row; None if it failed, or its scenario measures something else."""
    return row.payload if isinstance(row.payload, TTFTPayload) else None
