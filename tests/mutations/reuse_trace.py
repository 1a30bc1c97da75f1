"""A replayed trace whose answers are remembered or wrong, whose clock starts late, or whose figures don't follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.bench import trace_replay
from experiments.scenarios import reuse_trace
from kvmem.cache import dynamic_cache
from kvmem.engines.base import FirstToken
from kvmem.engines.huggingface import HFBackend
from tests.mutations import baseline, ungraded, wrong_kv
from tests.mutations.mutation import Mutation, Patch, first_token_with_cache

KIND = "reuse_trace"
SMALL = (
    "scenario=reuse_trace",
    "scenario.memories=10",
    "scenario.uses=60",
    "scenario.seeds=1",
    "scenario.budget_shares=[0.2]",
    "scenario.replay_memories=3",
    "scenario.replay_uses=20",
    "scenario.replay_budget_share=1.0",
    "scenario.answer_tokens=4",
)
COUNTED = "tokens entered the model|computed 0 tokens"


def _nothing(first_token: Any, backend: Any, prompt: Any, cache: Any) -> FirstToken:
    return FirstToken(0, len(prompt.memory_ids))


def _views_rolled(original: Any) -> Any:
    def view_of(*given: Any, **named: Any) -> Any:
        view = original(*given, **named)
        for layer in view.layers:
            layer.keys = layer.keys.roll(1, dims=2)
        return view

    return view_of


def _starts_late(original: Any) -> Any:
    def answer(player: Any, query: Any) -> Any:
        sample = original(player, query)
        return replace(sample, user_s=0.3 * sample.user_s, engine_s=0.3 * sample.engine_s)

    return answer


def _untold(original: Any) -> Any:
    """No move tells when its KV was computed."""
    return lambda **fields: original(**{**fields, "build_s": None, "kept_s": None})


def _rows(run: str, **changed: float) -> Patch:
    """Changes figures before they are judged: of the replayed row, or of those with a share of the oracle."""

    def make(original: Any) -> Any:
        def judged_again(row: Any) -> Any:
            wanted = row.payload.run == run if run else row.payload.of_oracle_pct is not None
            return original(replace(row, payload=replace(row.payload, **changed)) if wanted else row)

        return judged_again

    return Patch(reuse_trace, "judged_again", make)


def _saves_more(original: Any) -> Any:
    def simulate(*given: Any, **named: Any) -> Any:
        found = original(*given, **named)
        return replace(found, saved_s=3 * found.saved_s)

    return simulate


def _trace(name: str, expected: str, *patches: Patch, arm: str = reuse_trace.OURS) -> Mutation:
    return Mutation(KIND, name, expected, patches, SMALL, arm)


MUTATIONS = [
    _trace("the replay returns remembered answers", COUNTED, Patch(HFBackend, "first_token", ungraded.remembered)),
    _trace("the replay computes nothing", COUNTED, Patch(HFBackend, "first_token", first_token_with_cache(_nothing))),
    _trace(
        "the replay's stored values are scaled", wrong_kv.STORED, wrong_kv.stored(wrong_kv.values_scaled, "kept_item")
    ),
    _trace(
        "the replay's views have rolled keys", "view that an answer", Patch(dynamic_cache, "view_of", _views_rolled)
    ),
    _trace("the replay's timer starts late", "not in its TTFT", Patch(trace_replay.Player, "_answer", _starts_late)),
    _trace("the replay's direct arm is 3 times slower", baseline.SLOW, baseline.direct_slower(3)),
    _trace("the replay's savings are larger", "net_saved_s is stored as", _rows("replayed", net_saved_s=1e6)),
    _trace("the replay's hits are more", "hit_pct is stored as", _rows("replayed", hit_pct=99.9)),
    _trace("the replay's builds are not told", "are not told", Patch(trace_replay, "ReplayedMove", _untold)),
    _trace(
        "the simulation saves three times the seconds",
        "the seconds saved differs|more seconds than any",
        Patch(reuse_trace, "simulate", _saves_more),
        arm="lfu",
    ),
    _trace("a simulated share is larger", "of_oracle_pct is stored", _rows("", of_oracle_pct=99.9), arm="lfu"),
]
