"""What a policy does on a trace and what that costs: the scheduler's own planner, its moves booked instead of made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from experiments.traces.base import Trace
from kvmem.scheduler import Costs, Move, Planner
from kvmem.scheduler.policies import Oracle, Policy

HORIZONS = (64, 256, 1024, 4096)
"""How far an oracle looks ahead, in uses. Greedy is not optimal, so several are tried and the best is taken."""


@dataclass(frozen=True)
class Outcome:
    """One policy on one trace. Seconds are sums over the trace; `ttft_s` has one entry a use."""

    ttft_s: np.ndarray
    saved_s: float
    """Time to first token saved against sending every memory as text."""
    build_s: float
    hits: int
    hit_tokens: int
    memory_tokens: int
    builds: int
    moved_bytes: int
    """Written by builds, admissions, promotions and demotions."""

    @property
    def net_saved_s(self) -> float:
        return self.saved_s - self.build_s

    @property
    def hit_share(self) -> float:
        """Of the memories' tokens."""
        return self.hit_tokens / self.memory_tokens


def simulate(
    trace: Trace,
    policy: Policy,
    budgets: Mapping[str, int],
    costs: Costs,
    planning: Costs | None = None,
    tick_every: int = 1,
    max_builds: int = 1,
    admit_misses: bool = True,
) -> Outcome:
    """Runs `trace`: a use, and after every `tick_every` of them a tick with at most `max_builds` builds.

    costs: what things take; planning: what the planner believes that they take (None: the same). admit_misses: the KV
    that a use computed is kept where the policy gives it a place, as the scheduler does; False: as before it did so.
    """
    planner = Planner(policy, budgets, planning or costs)
    names = [str(memory) for memory in range(len(trace.tokens))]
    for name, tokens in zip(names, trace.tokens, strict=True):
        planner.sized(name, tokens)
    tokens_M = np.array(trace.tokens)
    direct_s = costs.prefill_s(tokens_M + trace.query_tokens)
    injected_s = costs.prefill_s(trace.query_tokens, tokens_M)
    build_s_M = costs.prefill_s(tokens_M)
    tier_of: dict[str, str] = {}
    ttft_s: list[float] = []
    hits = hit_tokens = builds = moved_bytes = 0
    saved_s = build_s = 0.0
    for event in trace.events:
        memory, name = event.memory, names[event.memory]
        if event.kind == "edit":
            planner.edited(name)
            tier_of.pop(name, None)
            continue
        ttft_s.append(direct_s[memory])
        if name in tier_of:
            nbytes = costs.nbytes(trace.tokens[memory])
            ttft_s[-1] = injected_s[memory] + costs.load_s(nbytes, tier_of[name])
            saved_s += direct_s[memory] - ttft_s[-1]
            hits += 1
            hit_tokens += trace.tokens[memory]
        planner.used(name, trace.query_tokens)
        moves = planner.admit(name, tier_of) if admit_misses and name not in tier_of else []
        if len(ttft_s) % tick_every == 0:
            moves += planner.plan(after(moves, tier_of), max_builds)
        for move in moves:
            tier_of.pop(move.memory_id, None)
            if move.target is not None:
                tier_of[move.memory_id] = move.target
                moved_bytes += costs.nbytes(trace.tokens[int(move.memory_id)])
            if move.kind == "build":
                builds += 1
                build_s += build_s_M[int(move.memory_id)]
    used_tokens = sum(trace.tokens[event.memory] for event in trace.events if event.kind == "use")
    return Outcome(np.array(ttft_s), saved_s, build_s, hits, hit_tokens, used_tokens, builds, moved_bytes)


def after(moves: list[Move], tier_of: Mapping[str, str]) -> dict[str, str]:
    """Memory -> tier, once these moves are made."""
    place_of = dict(tier_of)
    for move in moves:
        place_of.pop(move.memory_id, None)
        if move.target is not None:
            place_of[move.memory_id] = move.target
    return place_of


def event_times(trace: Trace) -> tuple[list[list[int]], list[list[int]]]:
    """For each memory the times of its uses and of its edits, in uses before it."""
    uses: list[list[int]] = [[] for _ in trace.tokens]
    edits: list[list[int]] = [[] for _ in trace.tokens]
    now = 0
    for event in trace.events:
        (uses if event.kind == "use" else edits)[event.memory].append(now)
        now += event.kind == "use"
    return uses, edits


def best_oracle(
    trace: Trace,
    budgets: Mapping[str, int],
    costs: Costs,
    tick_every: int = 1,
    max_builds: int = 1,
    admit_misses: bool = True,
) -> Outcome:
    """The oracle whose horizon nets most on this trace."""
    uses, edits = event_times(trace)
    outcomes = [
        simulate(
            trace,
            Oracle(horizon, uses, edits),
            budgets,
            costs,
            tick_every=tick_every,
            max_builds=max_builds,
            admit_misses=admit_misses,
        )
        for horizon in HORIZONS
    ]
    return max(outcomes, key=lambda outcome: outcome.net_saved_s)


def bound_s(trace: Trace, budget_bytes: int, costs: Costs) -> float:
    """Net seconds that no policy can exceed on this trace: the fractional relaxation of what to keep.

    A use is served from KV either because that was kept since the use before, for saved seconds and (bytes × time) of
    the budget, or because it was built for this use, for saved less build seconds. Kept stretches may be kept in part,
    and the budget binds on average only: a fractional knapsack, filled by value per byte and time (the relaxation of
    Berger, Beckmann & Harchol-Balter 2018, "Practical Bounds on Optimal Caching with Variable Object Sizes").
    """
    uses, edits = event_times(trace)
    value_s: list[float] = []
    space_time: list[float] = []
    built_for_one_use_s = 0.0
    for memory, tokens in enumerate(trace.tokens):
        saved_s = float(costs.saved_s(tokens, trace.query_tokens))
        at_once_s = max(0.0, saved_s - costs.prefill_s(tokens))
        built_for_one_use_s += at_once_s * len(uses[memory])
        times = np.array(uses[memory])
        edits_before = np.searchsorted(np.array(edits[memory]), times, side="right")
        stretches = np.diff(times)[np.diff(edits_before) == 0]
        value_s += [saved_s - at_once_s] * len(stretches)
        space_time += (stretches * costs.nbytes(tokens)).tolist()
    values, spaces = np.array(value_s), np.array(space_time)
    order = np.argsort(-values / spaces)
    spent = np.cumsum(spaces[order])
    fits = np.clip((float(budget_bytes) * trace.uses - (spent - spaces[order])) / spaces[order], 0.0, 1.0)
    return built_for_one_use_s + float((fits * values[order]).sum())
