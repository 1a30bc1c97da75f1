"""Which policy keeps the right memories as KV? A short trace runs on a model, then all policies are simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from scipy import stats

from experiments.bench import Bench, Setup, replay
from experiments.results import Payload, Row, between, formatting
from experiments.scenarios.base import ModelScenario
from experiments.traces import FAMILIES, Outcome, Trace, TraceFamily, best_oracle, bound_s, jsonl, simulate
from kvmem.engines import backend_class
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError
from kvmem.scheduler import Costs
from kvmem.scheduler.policies import BenefitPerByte, Oracle, policy_classes

AGREEMENT = 0.10
"""The largest allowed relative difference between a simulated and a replayed figure."""
OURS = BenefitPerByte.name


@plain_dataclass(frozen=True)
class ReplayCell:
    """The short trace that is replayed on the model."""

    label: str
    trace: Trace


@plain_dataclass(frozen=True)
class TrafficCell:
    """One family of traces under one budget. Every policy is simulated on it."""

    label: str
    traces: tuple[Trace, ...]
    budget_share: float


@plain_dataclass(frozen=True, kw_only=True)
class ReuseTracePayload(Payload):
    """One policy under one budget: on the replayed trace, or on all simulated traces of one family."""

    name: ClassVar[str] = "reuse_trace"
    columns: ClassVar[tuple[str, ...]] = (
        "traffic",
        "budget_pct",
        "run",
        "hit_pct",
        "ttft_p50_s",
        "ttft_p90_s",
        "ttft_p99_s",
        "builds",
        "moved_bytes",
        "net_saved_s",
        "of_oracle_pct",
        "interval",
        "of_bound_pct",
    )

    traffic: str
    budget_pct: float
    """The budget in percent of the KV of all memories."""
    run: str
    """replayed (on the model) or simulated."""
    hit_pct: float
    """The share of the requested memories' tokens that were found as KV, in percent."""
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    builds: float
    moved_bytes: float
    """The bytes that builds, promotions and demotions wrote."""
    net_saved_s: float
    """TTFT saved against sending every memory as text, minus the seconds of the builds."""
    of_oracle_pct: float | None = None
    """net_saved_s in percent of the oracle's, which knows the whole trace."""
    of_oracle_interval: tuple[float, float] | None = None
    """The 95% interval of of_oracle_pct over the traces."""
    of_bound_pct: float | None = None
    """net_saved_s in percent of a bound that no policy can exceed."""
    net_saved_all_s: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    samples: list[tuple[int, int, float]] = field(default_factory=list)
    """The replay's prefills: (new tokens, cached tokens, seconds) of each."""
    differs: dict[str, float] = field(default_factory=dict)
    """The relative difference between the simulation and the replay, for each figure."""
    costs: dict[str, float | dict[str, float]] = field(default_factory=dict)
    """The cost model that is fitted to the replay."""

    @property
    def interval(self) -> str | None:
        return self.of_oracle_pct if self.of_oracle_pct is None else formatting.percent_range(self.of_oracle_interval)


@dataclass(config=ConfigDict(extra="forbid"))
class ReuseTrace(ModelScenario[ReplayCell | TrafficCell]):
    """Compares policies by the seconds that they save.

    First a short trace is replayed on the model, and a cost model is fitted to its prefills. Simulating the same trace
    checks the simulator. Then every policy, the oracle among them, is simulated on `seeds` traces of each family, with
    one tier.

    The seconds saved are user TTFT against sending every memory as text. Net savings subtract the seconds of builds,
    which happen outside of requests.
    """

    replay_uses: int = Field(default=50, ge=1)
    replay_memories: int = Field(default=12, ge=1)
    replay_family: str = "bursts"
    replay_budget_share: float = Field(default=0.4, gt=0)
    memories: int = Field(default=150, ge=1)
    uses: int = Field(default=2000, ge=1)
    seeds: int = Field(default=3, ge=1)
    """The number of traces in each family; ten for a published figure."""
    first_seed: int = Field(default=100, ge=0)
    budget_shares: list[float] = field(default_factory=lambda: [0.05, 0.15, 0.4])
    """Budgets, as shares of the KV of all memories."""
    tick_every: int = Field(default=2, ge=1)
    """The number of uses between two ticks. A tick builds at most one memory."""
    trace_file: str | None = None
    """A trace of your own (JSON lines, see experiments/traces/jsonl.py), which replaces the families."""

    name: ClassVar[str] = "reuse_trace"
    question: ClassVar[str] = "Which policy keeps the right memories as KV?"

    def __post_init__(self) -> None:
        self._costs: Costs | None = None
        FAMILIES.find(self.replay_family)

    def check(self, setup: Setup) -> None:
        if backend_class(setup.backend.backend) is not HFBackend:
            raise ConfigError(
                f"scenario=reuse_trace replays its trace on backend=huggingface, and this run has "
                f"backend={setup.backend.backend}. Use backend=huggingface."
            )
        if self.trace_file is not None:
            jsonl.lines(Path(self.trace_file))

    def cells(self, bench: Bench) -> Sequence[ReplayCell | TrafficCell]:
        families = FAMILIES.classes()
        short = families[self.replay_family]().draw(self.replay_memories, self.replay_uses, bench.setup.seed, 0)
        return [ReplayCell(f"replay of {short.uses} uses", short), *self._traffic(bench, families)]

    def _traffic(self, bench: Bench, families: dict[str, type[TraceFamily]]) -> list[TrafficCell]:
        drawn: dict[str, tuple[Trace, ...]]
        if self.trace_file is not None:
            drawn = {self.trace_file: (jsonl.read(Path(self.trace_file), bench.backend.template),)}
        else:
            seeds = range(self.first_seed, self.first_seed + self.seeds)
            drawn = {
                name: tuple(family().draw(self.memories, self.uses, seed, jsonl.QUERY_TOKENS) for seed in seeds)
                for name, family in sorted(families.items())
            }
        return [
            TrafficCell(f"{name} {formatting.percent(100 * share)}", of_family, share)
            for name, of_family in drawn.items()
            for share in self.budget_shares
        ]

    def measure(self, bench: Bench, cell: ReplayCell | TrafficCell) -> list[Row]:
        if isinstance(cell, ReplayCell):
            return self._replay(bench, cell)
        if self._costs is None:
            raise ConfigError("The simulation needs the costs of the replay, and the replay failed. See its row.")
        return self._simulate(bench, cell, self._costs)

    def _replay(self, bench: Bench, cell: ReplayCell) -> list[Row]:
        real = replay(bench.memory, cell.trace, OURS, self.replay_budget_share, self.tick_every)
        costs = Costs.fitted(
            real.samples, real.planning.kv_bytes_a_token, kv_bytes_a_memory=real.planning.kv_bytes_a_memory
        )
        self._costs = costs
        budget = int(self.replay_budget_share * sum(map(costs.nbytes, real.trace.tokens)))
        policy = policy_classes()[OURS]()
        simulated = simulate(real.trace, policy, {"ram": budget}, costs, real.planning, self.tick_every)
        differs = disagreement(real.outcome, simulated)
        hits = real.outcome.hits
        wrong = f"{hits - real.same_first_tokens} of {hits} hits have another first token than the whole prompt"
        worst = max(differs, key=lambda name: differs[name])
        apart = f"{worst} differs by {formatting.percent(100 * differs[worst])}"
        same = hits == real.same_first_tokens
        payload = partial(
            _payload, traffic=f"{cell.trace.family}, {cell.trace.uses} uses", budget_pct=100 * self.replay_budget_share
        )
        conditions = bench.conditions_now()
        return [
            self._row(
                bench,
                OURS,
                payload([real.outcome], run="replayed", samples=real.samples),
                "ok" if same else "invalid",
                "" if same else wrong,
                conditions,
                equality="tokens" if same else None,
            ),
            self._row(
                bench,
                OURS,
                payload([simulated], run="simulated", differs=differs, costs=vars(costs)),
                "ok" if differs[worst] <= AGREEMENT else "invalid",
                f"{apart} from the replay",
                conditions,
            ),
        ]

    def _simulate(self, bench: Bench, cell: TrafficCell, costs: Costs) -> list[Row]:
        budgets = [int(cell.budget_share * sum(map(costs.nbytes, trace.tokens))) for trace in cell.traces]
        runs = list(zip(cell.traces, [{"ram": budget} for budget in budgets], strict=True))
        outcomes = {
            name: [simulate(trace, cls(), budget, costs, tick_every=self.tick_every) for trace, budget in runs]
            for name, cls in sorted(policy_classes().items())
            if cls is not Oracle
        }
        outcomes[Oracle.name] = [best_oracle(trace, budget, costs, self.tick_every) for trace, budget in runs]
        bounds = np.array([bound_s(trace, budget["ram"], costs) for trace, budget in runs])
        net = {name: np.array([outcome.net_saved_s for outcome in of]) for name, of in outcomes.items()}
        rows = []
        for name, of_policy in outcomes.items():
            share_pct, share_interval = ratio_of_sums(net[name], net[Oracle.name])
            payload = _payload(
                of_policy,
                traffic=cell.traces[0].family,
                budget_pct=100 * cell.budget_share,
                run="simulated",
                of_oracle_pct=share_pct,
                of_oracle_interval=share_interval,
                of_bound_pct=100 * float(net[name].sum() / bounds.sum()),
                net_saved_all_s=net[name].tolist(),
                seeds=[trace.seed for trace in cell.traces],
            )
            remark = behind(net[OURS], {other: net[other] for other in net if other != Oracle.name})
            rows.append(self._row(bench, name, payload, "ok", remark if name == OURS else "", {}))
        return rows

    def _row(
        self,
        bench: Bench,
        policy: str,
        payload: ReuseTracePayload,
        verdict: str,
        reason: str,
        conditions: dict[str, Any],
        equality: str | None = None,
    ) -> Row:
        return bench.row(
            self.name,
            arm=policy,
            context_tokens=0,
            query_tokens=0,
            equality=equality,
            verdict=verdict,
            verdict_reason=reason,
            conditions=conditions,
            payload=payload,
        )

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        payloads = [(row.arm, row.payload) for row in rows if isinstance(row.payload, ReuseTracePayload)]
        of: dict[str, list[float]] = {}
        for arm, payload in payloads:
            if payload.of_oracle_pct is not None:
                of.setdefault(arm, []).append(payload.of_oracle_pct)
        others = [max(values) for arm, values in of.items() if arm not in (OURS, Oracle.name)]
        if not of.get(OURS) or not others:
            return ""
        return (
            f"Of the seconds that an oracle saves, {OURS} saves {between(of[OURS], '%')}. "
            f"The best figure of any other policy in any cell is {between([max(others)], '%')}."
        )


def _payload(outcomes: Sequence[Outcome], **figures: Any) -> ReuseTracePayload:
    """The payload of several traces: percentages and percentiles over all of them, means of counts and seconds."""
    ttft_s = np.concatenate([outcome.ttft_s for outcome in outcomes])
    p50, p90, p99 = (float(np.percentile(ttft_s, percent)) for percent in (50, 90, 99))
    hit_tokens = sum(outcome.hit_tokens for outcome in outcomes)
    return ReuseTracePayload(
        hit_pct=100 * hit_tokens / sum(outcome.memory_tokens for outcome in outcomes),
        ttft_p50_s=p50,
        ttft_p90_s=p90,
        ttft_p99_s=p99,
        builds=float(np.mean([outcome.builds for outcome in outcomes])),
        moved_bytes=float(np.mean([outcome.moved_bytes for outcome in outcomes])),
        net_saved_s=float(np.mean([outcome.net_saved_s for outcome in outcomes])),
        **figures,
    )


def disagreement(real: Outcome, simulated: Outcome) -> dict[str, float]:
    """The relative difference between the simulation and the replay, for each figure."""
    pairs = {
        "the sum of TTFT": (real.ttft_s.sum(), simulated.ttft_s.sum()),
        "the seconds saved": (real.saved_s, simulated.saved_s),
        "the seconds of builds": (real.build_s, simulated.build_s),
        "the tokens hit": (real.hit_tokens, simulated.hit_tokens),
    }
    return {name: float(abs(b - a) / abs(a)) if a else float(bool(b)) for name, (a, b) in pairs.items()}


def ratio_of_sums(values: np.ndarray, of: np.ndarray) -> tuple[float, tuple[float, float] | None]:
    """sum(values) / sum(of) in percent, and its 95% interval over the traces; None for fewer than 3 traces.

    The interval is Student's t of the linearised ratio (Cochran, "Sampling techniques", 1977, ch. 6). A bootstrap of
    three traces would be too narrow.
    """
    share = float(values.sum() / of.sum())
    if len(values) < 3:
        return 100 * share, None
    low, high = _t_interval((values - share * of) / of.mean())
    return 100 * share, (100 * (share + low), 100 * (share + high))


def behind(ours: np.ndarray, others: dict[str, np.ndarray]) -> str:
    """The policies that save more than `ours`, as text, or "" if there are none.

    A policy counts if the 95% interval of the paired difference (Student's t) is above 0.
    """
    if len(ours) < 3:
        return ""
    found = []
    for name, other in others.items():
        low, high = _t_interval(other - ours)
        if low > 0:
            found.append(f"behind {name} by {formatting.seconds(low)} to {formatting.seconds(high)} a trace")
    return "; ".join(found)


def _t_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% confidence interval of the mean (Student's t)."""
    mean, half = float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean - half, mean + half
