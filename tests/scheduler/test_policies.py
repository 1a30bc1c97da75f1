"""Policies, planner and simulator, on generated traffic."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.traces.base import TraceFamily
from experiments.traces.bursts import Bursts
from experiments.traces.drifting import Drifting
from experiments.traces.simulator import best_oracle, bound_s, simulate
from experiments.traces.steady import Steady
from kvmem.errors import ConfigError
from kvmem.scheduler.cost_model import Costs
from kvmem.scheduler.planner import Planner
from kvmem.scheduler.policies.base import policy, policy_classes

COSTS = Costs(0.02, 0.0012, 3e-7, 100)
ONLINE = sorted(set(policy_classes()) - {"oracle"})
LEVELS = {"ram": 0, "disk": 1}


def test_every_policy_is_found_by_listing() -> None:
    assert set(policy_classes()) == {"benefit_per_byte", "lfu", "lru", "memos_topk", "oracle", "tinylfu"}
    with pytest.raises(ConfigError, match="Did you mean lfu"):
        policy("lfuu")


@pytest.mark.parametrize("name", ONLINE)
@settings(max_examples=25, deadline=None)
@given(
    events=st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=40),
    ram=st.integers(0, 4000),
    disk=st.integers(0, 4000),
)
def test_plans_keep_budgets_and_state_goes_through_json(
    name: str, events: list[tuple[int, bool]], ram: int, disk: int
) -> None:
    """Every move starts where the memory is, and no budget is exceeded after any of them."""
    planner = Planner(policy(name), {"ram": ram, "disk": disk}, COSTS)
    place: dict[str, str] = {}
    for memory in range(8):
        planner.sized(f"m{memory}", 4 * memory)  # m0 can't be stored
    for memory, edit in events:
        if edit:
            planner.edited(f"m{memory}")
            place.pop(f"m{memory}", None)
        else:
            planner.used(f"m{memory}", 20)
        for move in planner.plan(place, 2):
            assert place.pop(move.memory_id, None) == move.source and move.memory_id != "m0"
            if move.target is not None:
                place[move.memory_id] = move.target
            if move.kind in ("promote", "demote"):
                assert (LEVELS[move.target or ""] < LEVELS[move.source or ""]) == (move.kind == "promote")
            for tier, budget in (("ram", ram), ("disk", disk)):
                assert sum(400 * int(memory_id[1:]) for memory_id, at in place.items() if at == tier) <= budget
    again = Planner(policy(name), {"ram": ram, "disk": disk}, COSTS)
    state = json.loads(json.dumps(planner.state()))
    again.restore(state)
    assert again.state() == state


@pytest.mark.parametrize("family", [Steady(), Drifting(), Bursts()], ids=lambda family: family.name)
def test_no_policy_beats_the_bound(family: TraceFamily) -> None:
    trace = family.draw(30, 400, 2000, 64)
    assert trace == family.draw(30, 400, 2000, 64) and trace.uses == 400
    budget = sum(trace.tokens) * COSTS.kv_bytes_a_token // 5
    bound = bound_s(trace, budget, COSTS)
    oracle = best_oracle(trace, {"ram": budget}, COSTS)
    assert 0 < oracle.net_saved_s <= bound
    for name in ONLINE:
        outcome = simulate(trace, policy(name), {"ram": budget}, COSTS)
        assert outcome.net_saved_s <= bound and 0 <= outcome.hit_share <= 1
        assert outcome.ttft_s.sum() + outcome.saved_s == pytest.approx(
            sum(COSTS.prefill_s(trace.tokens[e.memory] + 64) for e in trace.events if e.kind == "use")
        )


def test_the_fit_recovers_the_costs() -> None:
    samples = [(new, behind, COSTS.prefill_s(new, behind)) for new in (16, 64, 512) for behind in (0, 700)]
    fitted = Costs.fitted(samples, 100)
    assert np.allclose([fitted.base_s, fitted.token_s, fitted.pair_s], [COSTS.base_s, COSTS.token_s, COSTS.pair_s])
    assert fitted.saved_s(500, 64) == pytest.approx(COSTS.prefill_s(564) - COSTS.prefill_s(64, 500))
