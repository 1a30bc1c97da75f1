"""Which policy keeps the right memories as KV? A short trace played for real, then every policy in simulation."""

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

from experiments.bench import Bench, replay
from experiments.results import Payload, Row, between, formatting
from experiments.scenarios.base import ModelScenario
from experiments.traces import FAMILIES, Outcome, Trace, TraceFamily, best_oracle, bound_s, jsonl, simulate
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError
from kvmem.scheduler import Costs
from kvmem.scheduler.policies import BenefitPerByte, Oracle, policy_classes

AGREEMENT = 0.10
"""By how much a simulated figure may differ from the replayed one."""
OURS = BenefitPerByte.name


@plain_dataclass(frozen=True)
class ReplayCell:
    """The short trace, played on the model."""

    label: str
    trace: Trace


@plain_dataclass(frozen=True)
class TrafficCell:
    """One kind of traffic under one budget, for every policy."""

    label: str
    traces: tuple[Trace, ...]
    budget_share: float


@plain_dataclass(frozen=True, kw_only=True)
class ReuseTracePayload(Payload):
    """One policy under one budget: on the replayed trace, or on all simulated traces of one kind of traffic."""

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
    """Of the KV of all memories."""
    run: str
    """replayed on the model, or simulated."""
    hit_pct: float
    """Of the tokens of the requested memories."""
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    builds: float
    moved_bytes: float
    """Written by builds, promotions and demotions."""
    net_saved_s: float
    """TTFT saved against sending every memory as text, less the seconds of the builds."""
    of_oracle_pct: float | None = None
    """net_saved_s over that of the oracle, which knows the trace."""
    of_oracle_interval: tuple[float, float] | None = None
    """95% interval of of_oracle_pct over the traces."""
    of_bound_pct: float | None = None
    """net_saved_s over a bound that no policy can exceed."""
    net_saved_all_s: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    samples: list[tuple[int, int, float]] = field(default_factory=list)
    """Of the replay: (new tokens, cached tokens, seconds) of each prefill."""
    differs: dict[str, float] = field(default_factory=dict)
    """By which share each figure of the simulation differs from the replay's."""
    costs: dict[str, float | dict[str, float]] = field(default_factory=dict)
    """The cost model that was fitted to the replay."""

    @property
    def interval(self) -> str | None:
        return self.of_oracle_pct if self.of_oracle_pct is None else formatting.percent_range(self.of_oracle_interval)


@dataclass(config=ConfigDict(extra="forbid"))
class ReuseTrace(ModelScenario[ReplayCell | TrafficCell]):
    """A replay gives the costs, and is simulated on them to see that the simulator tells the truth; then every policy
    runs on `seeds` traces of each family, with the oracle and a bound beside. One tier, all of whose bytes are at hand.

    Seconds saved are user TTFT against sending every memory as text; net: less what builds took, off the request path.
    """

    replay_uses: int = Field(default=50, ge=1)
    replay_memories: int = Field(default=12, ge=1)
    replay_family: str = "bursts"
    replay_budget_share: float = Field(default=0.4, gt=0)
    memories: int = Field(default=150, ge=1)
    uses: int = Field(default=2000, ge=1)
    seeds: int = Field(default=3, ge=1)
    """Traces of each family; ten for a figure to publish."""
    first_seed: int = Field(default=100, ge=0)
    budget_shares: list[float] = field(default_factory=lambda: [0.05, 0.15, 0.4])
    """Budgets, as shares of the KV of all memories."""
    tick_every: int = Field(default=2, ge=1)
    """Uses between two ticks, each of which builds one memory at most."""
    trace_file: str | None = None
    """A trace of your own (JSON lines, see experiments/traces/jsonl.py) instead of the families."""

    name: ClassVar[str] = "reuse_trace"
    question: ClassVar[str] = "Which policy keeps the right memories as KV?"

    def __post_init__(self) -> None:
        self._costs: Costs | None = None
        FAMILIES.find(self.replay_family)

    def cells(self, bench: Bench) -> Sequence[ReplayCell | TrafficCell]:
        if type(bench.backend) is not HFBackend:
            raise ConfigError(
                f"scenario=reuse_trace plays its trace on backend=huggingface, not on {type(bench.backend).name}."
            )
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
            raise ConfigError("There are no costs to simulate on, for the replay failed. See its row.")
        return self._simulate(bench, cell, self._costs)

    def _replay(self, bench: Bench, cell: ReplayCell) -> list[Row]:
        real = replay(bench.memory, cell.trace, OURS, self.replay_budget_share, self.tick_every)
        costs = Costs.fitted(real.samples, real.planning.kv_bytes_a_token)
        self._costs = costs
        budget = int(self.replay_budget_share * sum(real.trace.tokens) * costs.kv_bytes_a_token)
        policy = policy_classes()[OURS]()
        simulated = simulate(real.trace, policy, {"ram": budget}, costs, real.planning, self.tick_every)
        differs = disagreement(real.outcome, simulated)
        hits = real.outcome.hits
        wrong = f"{hits - real.same_first_tokens} of {hits} hits began with another token than the whole prompt"
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
        budgets = [int(cell.budget_share * sum(trace.tokens) * costs.kv_bytes_a_token) for trace in cell.traces]
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
            f"Of the seconds that an oracle saves, {OURS} saves {between(of[OURS], '%')}; "
            f"the best that any other policy does in any cell is {between([max(others)], '%')}."
        )


def _payload(outcomes: Sequence[Outcome], **figures: Any) -> ReuseTracePayload:
    """Percentages and percentiles over all traces together; counts and seconds as means over the traces."""
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
    """By which share each figure of the simulation differs from the replay's."""
    pairs = {
        "the sum of TTFT": (real.ttft_s.sum(), simulated.ttft_s.sum()),
        "the seconds saved": (real.saved_s, simulated.saved_s),
        "the seconds of builds": (real.build_s, simulated.build_s),
        "the tokens hit": (real.hit_tokens, simulated.hit_tokens),
    }
    return {name: float(abs(b - a) / abs(a)) if a else float(bool(b)) for name, (a, b) in pairs.items()}


def ratio_of_sums(values: np.ndarray, of: np.ndarray) -> tuple[float, tuple[float, float] | None]:
    """sum(values) / sum(of) in percent, and its 95% interval over the traces (Student's t of the linearised ratio:
    Cochran, "Sampling techniques", 1977, ch. 6; a bootstrap of three traces is too narrow); None for fewer than 3."""
    share = float(values.sum() / of.sum())
    if len(values) < 3:
        return 100 * share, None
    low, high = _t_interval((values - share * of) / of.mean())
    return 100 * share, (100 * (share + low), 100 * (share + high))


def behind(ours: np.ndarray, others: dict[str, np.ndarray]) -> str:
    """The policies that net more than `ours`, by a 95% interval (Student's t, paired) that holds no 0; "" if none
    does."""
    if len(ours) < 3:
        return ""
    found = []
    for name, other in others.items():
        low, high = _t_interval(other - ours)
        if low > 0:
            found.append(f"behind {name} by {formatting.seconds(low)} to {formatting.seconds(high)} a trace")
    return "; ".join(found)


def _t_interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean, with 95% confidence."""
    mean, half = float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean - half, mean + half
