"""Which policy keeps the right memories as KV? A short trace runs on a model, then all policies are simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from scipy import stats

from experiments.bench import (
    Bench,
    Replayed,
    ReplayedMove,
    ReplayedUse,
    Setup,
    compare,
    judged_again,
    outcome_of,
    replay,
)
from experiments.measurement import clock_misses
from experiments.results import Evidence, JudgedPayload, Row, between, formatting, ttft_of
from experiments.scenarios.base import ModelScenario
from experiments.traces import FAMILIES, Event, Outcome, Trace, TraceFamily, best_oracle, bound_s, jsonl, simulate
from experiments.workloads import Cell
from kvmem.engines import backend_class
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError
from kvmem.scheduler import Costs
from kvmem.scheduler.policies import BenefitPerByte, Oracle, policy_classes

AGREEMENT = 0.10
"""The largest allowed relative difference between a simulated and a replayed figure."""
OURS = BenefitPerByte.name
ROUNDING_S = 1e-6
DECISIONS = ("the tokens hit", "the number of builds")
"""What a simulation and a replay agree on however noisy the machine is."""


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
class Rehearsal:
    """The replayed trace, and everything that simulates it again."""

    tokens: list[int]
    query_tokens: int
    events: list[tuple[str, int]]
    """(use or edit, the memory's number), in order of time."""
    planning: dict[str, float | dict[str, float]]
    """The cost model by which the scheduler planned."""
    budget_bytes: int
    tick_every: int
    samples: list[tuple[int, int, float]]
    """(computed tokens, cached tokens before them, seconds) of each prefill, to which the costs are fitted."""
    replayed: dict[str, float]
    """The replay's figures that the simulation is compared with."""
    admit_misses: bool = False
    """Whether the scheduler kept what misses computed. It did not in rows that do not say so."""

    def again(self, costs: Costs) -> Outcome:
        events = tuple(Event("edit" if kind == "edit" else "use", memory) for kind, memory in self.events)
        trace = Trace("", 0, tuple(self.tokens), self.query_tokens, events)
        policy = policy_classes()[OURS]()
        return simulate(
            trace,
            policy,
            {"ram": self.budget_bytes},
            costs,
            costs_of(self.planning),
            self.tick_every,
            admit_misses=self.admit_misses,
        )


@plain_dataclass(frozen=True, kw_only=True)
class ReuseTracePayload(JudgedPayload):
    """One policy under one budget: on the replayed trace, or on all simulated traces of one family.

    `judged` of the replay compares its hits with the same prompts computed from their text.
    """

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
    uses: list[ReplayedUse] = field(default_factory=list)
    """Of the replay, in order of time."""
    moves: list[ReplayedMove] = field(default_factory=list)
    rehearsal: Rehearsal | None = None
    """Of the simulation that is compared with the replay."""
    oracle_saved_all_s: list[float] = field(default_factory=list)
    """The oracle's net seconds, by trace."""
    bound_all_s: list[float] = field(default_factory=list)
    """The seconds that no policy can exceed, by trace."""
    others_saved_all_s: dict[str, list[float]] = field(default_factory=dict)
    """The net seconds of each other policy, by trace; only in our policy's row."""

    def from_calls(self, row: Row, evidence: Evidence) -> dict[str, float | None]:
        """The seconds saved by the judged calls of the hits, and the builds beside them."""
        hits_s, direct_s = (
            sum(call.user_s for call in evidence.calls if call.arm == arm) for arm in (row.arm, evidence.direct_arm)
        )
        return {"net_saved_s": direct_s - hits_s - sum(move.build_s or 0.0 for move in self.moves)}

    def recomputed(self, row: Row) -> dict[str, float | None]:
        if self.uses:
            return _figures_of([outcome_of(self.uses, self.moves)])
        if self.rehearsal is not None:
            return _figures_of([self.rehearsal.again(costs_of(self.costs))])
        if not self.bound_all_s:
            return {}
        net = np.array(self.net_saved_all_s)
        return {
            "net_saved_s": float(net.mean()),
            "of_oracle_pct": ratio_of_sums(net, np.array(self.oracle_saved_all_s))[0],
            "of_bound_pct": 100 * float(net.sum() / sum(self.bound_all_s)),
        }

    def failures(self, row: Row) -> list[str]:
        found = []
        for number, use in enumerate(self.uses):
            if use.computed_tokens is not None and use.computed_tokens != use.new_tokens:
                found.append(f"use {number} computed {use.computed_tokens} tokens, and needs {use.new_tokens}")
                break
        if lost := clock_misses([use.outer_s for use in self.uses], [use.user_s for use in self.uses]):
            found.append(f"{lost} of a use are not in its TTFT")
        if self.judged is not None and self.judged.evidence is not None:
            told = {seconds for move in self.moves for seconds in (move.build_s, move.kept_s)}
            if untold := set(self.judged.evidence.build_all_s) - told:
                found.append(f"{formatting.plural(len(untold), 'build')} of memories that were hit are not told")
        if self.rehearsal is not None:
            found += self._wrong_rehearsal(self.rehearsal)
        if any(saved > most + ROUNDING_S for saved, most in zip(self.net_saved_all_s, self.bound_all_s, strict=False)):
            found.append("it saves more seconds than any policy can")
        if self.of_oracle_interval is not None and self.oracle_saved_all_s:
            again = ratio_of_sums(np.array(self.net_saved_all_s), np.array(self.oracle_saved_all_s))[1]
            if again is None or not np.allclose(again, self.of_oracle_interval, rtol=1e-6):
                found.append("the interval of its share of the oracle is not that of its traces")
        return found

    def _wrong_rehearsal(self, rehearsal: Rehearsal) -> list[str]:
        found = []
        costs = costs_of(self.costs)
        fitted = Costs.fitted(rehearsal.samples, costs.kv_bytes_a_token)
        if not np.allclose([fitted.base_s, fitted.token_s, fitted.pair_s], [costs.base_s, costs.token_s, costs.pair_s]):
            found.append("its costs are not those that the replay's prefills give")
        differs = disagreement(rehearsal.replayed, compared_figures(rehearsal.again(costs)))
        if differs.keys() != self.differs.keys() or not np.allclose(
            list(differs.values()), [self.differs[name] for name in differs]
        ):
            found.append("its difference from the replay is stored wrongly")
        calm = set(self.refers_to.values()) == {"ok"}  # noise moves seconds, and no decision
        judged = {name: off for name, off in self.differs.items() if calm or name in DECISIONS}
        if max(judged.values(), default=0.0) > AGREEMENT:
            found.append(f"{_apart(judged)}, and {formatting.percent(100 * AGREEMENT)} are allowed")
        return found

    def remarks(self) -> list[str]:
        if self.differs:
            return [_apart(self.differs)]
        net = np.array(self.net_saved_all_s)
        others = {name: np.array(saved) for name, saved in self.others_saved_all_s.items()}
        return [remark] if others and (remark := behind(net, others)) else []

    @property
    def interval(self) -> str | None:
        return self.of_oracle_pct if self.of_oracle_pct is None else formatting.percent_range(self.of_oracle_interval)


@dataclass(config=ConfigDict(extra="forbid"))
class ReuseTrace(ModelScenario[ReplayCell | TrafficCell]):
    """Compares policies by the seconds that they save.

    First a short trace is replayed on the model. Its hits are judged against the same prompts computed from their text,
    by the rules of `kv_vs_direct`. A cost model is fitted to its prefills, and simulating the same trace checks the
    simulator: beyond 10% its row is invalid, and what is simulated with these costs is undecided. Then every policy,
    the oracle among them, is simulated on `seeds` traces of each family, with one tier.

    The seconds saved are user TTFT against sending every memory as text. Net savings subtract the seconds of builds,
    which happen outside of requests.
    """

    replay_uses: int = Field(default=50, ge=1)
    replay_memories: int = Field(default=12, ge=1)
    replay_family: str = "bursts"
    replay_budget_share: float = Field(default=0.4, gt=0)
    answer_tokens: int = Field(default=8, ge=1)
    """The number of greedy tokens that grade the first hit's answer."""
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
        self._verdicts: dict[str, str] = {}
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

    def resume(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if isinstance(row.payload, ReuseTracePayload) and row.payload.rehearsal is not None:
                self._set_costs(row, costs_of(row.payload.costs))

    def _set_costs(self, checked: Row, costs: Costs) -> None:
        """What is simulated has `costs`, and is worth what the simulation of the replay is."""
        self._costs, self._verdicts = costs, {"the simulated replay": str(checked.verdict)}

    def measure(self, bench: Bench, cell: ReplayCell | TrafficCell) -> list[Row]:
        if isinstance(cell, ReplayCell):
            return self._replay(bench, cell)
        if self._costs is None:
            raise ConfigError("The simulation needs the costs of the replay, and the replay failed. See its row.")
        return self._simulate(bench, cell, self._costs)

    def _replay(self, bench: Bench, cell: ReplayCell) -> list[Row]:
        real = replay(bench, cell.trace, OURS, self.replay_budget_share, self.tick_every, self.answer_tokens)
        if not real.items:
            raise ConfigError(
                "No use of the replay was a hit, so nothing is compared. Use a larger scenario.replay_uses or "
                "scenario.replay_budget_share."
            )
        costs = Costs.fitted(
            real.samples, real.planning.kv_bytes_a_token, kv_bytes_a_memory=real.planning.kv_bytes_a_memory
        )
        budget = int(self.replay_budget_share * sum(map(costs.nbytes, real.trace.tokens)))
        payload = partial(
            _payload, traffic=f"{cell.trace.family}, {cell.trace.uses} uses", budget_pct=100 * self.replay_budget_share
        )
        compared = compare(
            bench,
            self.name,
            Cell("", 0, "", 0, (), cell.label),
            OURS,
            real.measured,
            items=real.items,
            builds_s=real.builds_s,
            tier=real.tier,
            memories=1,
        )
        replayed = judged_again(
            replace(
                compared,
                payload=payload(
                    [real.outcome],
                    run="replayed",
                    samples=real.samples,
                    uses=real.uses,
                    moves=real.moves,
                    judged=ttft_of(compared),
                ),
            )
        )
        rehearsal = _rehearsal(real, budget, self.tick_every)
        simulated = rehearsal.again(costs)
        differs = disagreement(rehearsal.replayed, compared_figures(simulated))
        checked = self._row(
            bench,
            OURS,
            payload(
                [simulated],
                run="simulated",
                differs=differs,
                costs=vars(costs),
                rehearsal=rehearsal,
                refers_to={"the replay": str(replayed.verdict)},
            ),
            replayed.conditions,
        )
        self._set_costs(checked, costs)
        return [replayed, checked]

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
                oracle_saved_all_s=net[Oracle.name].tolist(),
                bound_all_s=bounds.tolist(),
                others_saved_all_s={other: net[other].tolist() for other in net if other not in (OURS, Oracle.name)}
                if name == OURS
                else {},
                refers_to=self._verdicts,
            )
            rows.append(self._row(bench, name, payload, {}))
        return rows

    def _row(self, bench: Bench, policy: str, payload: ReuseTracePayload, conditions: dict[str, Any]) -> Row:
        """A row of what is simulated, judged."""
        row = bench.row(self.name, arm=policy, context_tokens=0, query_tokens=0, conditions=conditions, payload=payload)
        return judged_again(row)

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
    return ReuseTracePayload(**_figures_of(outcomes), **figures)


def _figures_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ttft_s = np.concatenate([outcome.ttft_s for outcome in outcomes])
    hit_tokens = sum(outcome.hit_tokens for outcome in outcomes)
    return {
        "hit_pct": 100 * hit_tokens / sum(outcome.memory_tokens for outcome in outcomes),
        **{f"ttft_p{percent}_s": float(np.percentile(ttft_s, percent)) for percent in (50, 90, 99)},
        "builds": float(np.mean([outcome.builds for outcome in outcomes])),
        "moved_bytes": float(np.mean([outcome.moved_bytes for outcome in outcomes])),
        "net_saved_s": float(np.mean([outcome.net_saved_s for outcome in outcomes])),
    }


def _rehearsal(real: Replayed, budget_bytes: int, tick_every: int) -> Rehearsal:
    return Rehearsal(
        tokens=list(real.trace.tokens),
        query_tokens=real.trace.query_tokens,
        events=[(event.kind, event.memory) for event in real.trace.events],
        planning=vars(real.planning),
        budget_bytes=budget_bytes,
        tick_every=tick_every,
        samples=real.samples,
        replayed=compared_figures(real.outcome),
        admit_misses=True,
    )


def costs_of(stored: dict[str, Any]) -> Costs:
    """The cost model of a row's fields."""
    fields: dict[str, Any] = {
        name: int(value) if name.startswith("kv_bytes") else value for name, value in stored.items()
    }
    return Costs(**fields)


def compared_figures(outcome: Outcome) -> dict[str, float]:
    """The figures by which a simulation is compared with a replay."""
    return {
        "the sum of TTFT": float(outcome.ttft_s.sum()),
        "the seconds saved": float(outcome.saved_s),
        "the seconds of builds": float(outcome.build_s),
        "the tokens hit": float(outcome.hit_tokens),
        "the number of builds": float(outcome.builds),
    }


def _apart(differs: dict[str, float]) -> str:
    worst = max(differs, key=lambda name: differs[name])
    return f"{worst} differs by {formatting.percent(100 * differs[worst])} from the replay"


def disagreement(real: dict[str, float], simulated: dict[str, float]) -> dict[str, float]:
    """The relative difference between the simulation and the replay, for each figure."""
    return {
        name: abs(simulated[name] - value) / abs(value) if value else float(bool(simulated[name]))
        for name, value in real.items()
    }


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
