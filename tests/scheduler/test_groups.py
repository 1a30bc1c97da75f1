"""Memories that are used together become one joined item where that saves time; the answers stay the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvmem import TextualMemoryItem
from kvmem.cache.dynamic_cache import layers_of
from kvmem.engines.generation import Sampling
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import UnknownMemoryError
from kvmem.merge.reprefill import Reprefill
from kvmem.prompt.template import TokenizedPrompt
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.groups import MAX_COUNTED, MAX_MEMBERS, MIN_USES_TOGETHER, Groups, group_id
from kvmem.scheduler.planner import Planner
from kvmem.scheduler.policies.base import policy
from kvmem.scheduler.scheduler import MemScheduler
from tests.helpers.tiny import memory_on, same_bits
from tests.scheduler.test_scheduler import MEMORIES, QUERY, scheduler_on

PAIR = MEMORIES[:2]
ID = group_id(["m0", "m1"])


def as_text(scheduler: MemScheduler, memories: Sequence[TextualMemoryItem], tokens: int = 8) -> tuple[int, ...]:
    """Greedy tokens of the same prompt with nothing cached."""
    backend = scheduler.backend
    prompt = backend.template.split(scheduler.index.joint_tokens(memories), QUERY)
    return tuple(backend.decode(TokenizedPrompt((), prompt.ids), None, tokens, Sampling()))


def use_together(scheduler: MemScheduler, memories: Sequence[TextualMemoryItem], times: int) -> None:
    for _ in range(times):
        scheduler.observe(memories, QUERY)


def ticked(scheduler: MemScheduler) -> MemScheduler:
    while scheduler.tick():
        pass
    return scheduler


def test_a_pair_used_together_becomes_one_item(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    before = scheduler.answer(QUERY, PAIR, 8)
    assert before.cached_tokens == 0 and before.token_ids == as_text(scheduler, PAIR)
    use_together(scheduler, PAIR, 15)
    assert ID in ticked(scheduler).index.tiers()
    after = scheduler.answer(QUERY, PAIR, 8)
    joint = scheduler.index.joint_tokens(PAIR)
    assert after.cached_tokens == len(joint.token_ids) and after.prompt_tokens == before.prompt_tokens
    assert after.token_ids == before.token_ids
    assert f"{ID} is in ram. rank 1 of 3: " in scheduler.explain(ID)
    assert scheduler.index.tiers().get("m1") is None, "behind another, its own KV serves nothing"


def test_it_is_what_reprefill_gives(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    use_together(scheduler, PAIR, 15)
    item_id, _ = ticked(scheduler).index.stored()[ID]
    alone = [qwen3.build(memory.memory) for memory in PAIR]
    merged = qwen3.view(alone, Reprefill(), "\n\n")
    with scheduler.items.use(item_id) as item:
        assert item.metadata.tokens == merged.tokens
        assert same_bits(item, layers_of(merged))


def test_it_serves_its_first_memory_and_longer_orders_but_no_other(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3, admit_misses=False)
    use_together(scheduler, PAIR, 15)
    ticked(scheduler)
    scheduler.index.evict("m0")
    a, b, c = MEMORIES[:3]
    of_first = len(qwen3.template.memory_tokens(a.memory).body_ids)
    for memories, cached in (([a], of_first), ([a, b, c], of_first + 50), ([a, c], of_first), ([b], 0), ([b, a], 0)):
        answer = scheduler.answer(QUERY, memories, 8)
        assert answer.cached_tokens >= cached and bool(answer.cached_tokens) == bool(cached)
        assert answer.token_ids == as_text(scheduler, memories)


@pytest.mark.parametrize("member", [0, 1])
def test_an_edit_of_a_member_drops_it(qwen3: HFBackend, member: int) -> None:
    scheduler = scheduler_on(qwen3)
    use_together(scheduler, PAIR, 15)
    assert ID in ticked(scheduler).index.tiers()
    edited = list(PAIR)
    edited[member] = TextualMemoryItem(id=f"m{member}", memory=f"{PAIR[member].memory} And then some more.")
    scheduler.update(edited[member])
    assert ID not in scheduler.index.tiers()
    bytes_left = sum(scheduler.items.nbytes(item_id) for item_id in scheduler.items.ids())
    assert scheduler.items.used_bytes()["ram"] == bytes_left
    answer = scheduler.answer(QUERY, edited, 8)
    assert answer.token_ids == as_text(scheduler, edited)
    use_together(scheduler, edited, 15)
    again = ticked(scheduler).answer(QUERY, edited, 8)
    assert ID in scheduler.index.tiers() and again.cached_tokens == len(scheduler.index.joint_tokens(edited).token_ids)
    assert again.token_ids == answer.token_ids


def test_an_edit_that_was_not_announced_is_not_served_from_it(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3, admit_misses=False)
    use_together(scheduler, PAIR, 15)
    ticked(scheduler)
    scheduler.index.evict("m0")
    edited = [PAIR[0], TextualMemoryItem(id="m1", memory=f"{PAIR[1].memory} And then some more.")]
    answer = scheduler.answer(QUERY, edited, 8)
    assert answer.cached_tokens == 0 and answer.token_ids == as_text(scheduler, edited)
    assert scheduler.index.tiers() == {}


def test_groups_survive_a_restart(qwen3: HFBackend, tmp_path: Path) -> None:
    scheduler = scheduler_on(qwen3, tmp_path, ram=0)  # all on disk
    use_together(scheduler, PAIR, 15)
    before = ticked(scheduler).index.tiers()
    assert before[ID] == "disk"
    scheduler.items.close()
    assert scheduler.journal is not None
    scheduler.journal.close()  # as a process that was killed: what was observed comes back from the events
    for uses in (15, 16):
        again = scheduler_on(qwen3, tmp_path, ram=0)
        assert again.index.tiers() == before and again.planner.heads == {ID: ["m0"]}
        assert again.index.groups.state()["seen"] == [(("m0", "m1"), uses)]
        answer = again.answer(QUERY, PAIR, 8)
        assert answer.cached_tokens == len(again.index.joint_tokens(PAIR).token_ids)
        assert answer.token_ids == as_text(again, PAIR)
        again.close()


def test_any_orders_and_edits_answer_as_text(qwen3: HFBackend) -> None:
    """Three memories in random orders of one to three, sometimes edited, with a budget for about two of them."""
    chance = random.Random(0)
    now = list(MEMORIES[:3])
    scheduler = scheduler_on(qwen3, ram=2 * qwen3.build(MEMORIES[0].memory).metadata.kv_bytes)
    hits = 0
    for step in range(120):
        if step % 25 == 24:
            number = chance.randrange(3)
            now[number] = TextualMemoryItem(id=f"m{number}", memory=f"{now[number].memory} {step}")
        order = chance.choice([[0, 1], [0, 1], [0, 1, 2], [0], [1, 0], [2]])
        memories = [now[number] for number in order]
        answer = scheduler.answer(QUERY, memories, 3)
        assert answer.token_ids == as_text(scheduler, memories, 3), (step, order)
        hits += answer.cached_tokens > 0
        scheduler.tick()
        used = sum(scheduler.items.nbytes(item_id) for item_id in scheduler.items.ids())
        assert scheduler.items.used_bytes()["ram"] == used <= scheduler.items.budgets["ram"]
    assert hits > 30 and ID in scheduler.index.groups.members


def test_it_is_joined_only_where_that_pays() -> None:
    """A short text behind a long one that has KV: the joint build would cost more than the few tokens save."""
    planner = Planner(policy("benefit_per_byte"), {"ram": 1 << 30}, Costs(0.001, 1e-4, 0.0, 1000))
    planner.sized("long", 2000)
    planner.joined("long, short", ["long"])
    planner.sized("long, short", 2020)
    for _ in range(12):
        planner.used("long", 10)
        planner.used("long, short", 10)
    assert [move.memory_id for move in planner.plan({"long": "ram"}, 1)] == []
    assert [move.memory_id for move in planner.plan({}, 1)] != []
    planner.plan({"long, short": "ram"}, 1)
    assert planner.table.saved_s[planner.table.row_of["long"]] == 0, "the joined KV begins with it"


def test_a_head_is_built_again_where_loading_its_group_does_not_pay_for_it(qwen3: HFBackend, tmp_path: Path) -> None:
    """On this disk a load saves time only if all its tokens are used: no group is loaded for its first memory alone."""
    a_token = kv_bytes_a_token(qwen3)
    costs = Costs(0.02, 1.2e-3, 0.0, a_token, {"disk": 8e-4 / a_token})
    scheduler = MemScheduler(memory_on(qwen3), "benefit_per_byte", {"disk": 1 << 30}, tmp_path, costs)
    use_together(scheduler, MEMORIES[:4], 12)
    group = group_id([f"m{i}" for i in range(4)])
    assert group in ticked(scheduler).index.tiers()
    for id_ in scheduler.index.tiers():
        if id_ != group:
            scheduler.index.evict(id_)
    head, whole = (len(scheduler.index.joint_tokens(MEMORIES[:n]).token_ids) for n in (1, 4))
    assert costs.saved_s(head, 0.0) < costs.load_s(whole * a_token, "disk"), "the case in question"
    assert scheduler.answer(QUERY, MEMORIES[:1], 4).cached_tokens == 0
    for _ in range(60):
        scheduler.observe(MEMORIES[0], QUERY)
    assert "m0" in ticked(scheduler).index.tiers() and group in scheduler.index.tiers()
    answer = scheduler.answer(QUERY, MEMORIES[:1], 8)
    assert answer.cached_tokens > 50 and answer.token_ids == as_text(scheduler, MEMORIES[:1])
    scheduler.close()


def test_orders_are_counted_separately_up_to_a_limit() -> None:
    groups = Groups()
    for _ in range(MIN_USES_TOGETHER - 1):
        assert groups.used(["a", "b", "c"]) == []
    assert groups.used(["b", "a"]) == []
    assert groups.used(["a", "b", "d"]) == [group_id("ab")], "a head is seen in every order that begins with it"
    assert groups.used(["a", "b", "c"]) == [group_id("ab"), group_id("abc")]
    assert groups.heads(group_id("abc")) == ["a", group_id("ab")] and groups.of("b") == list(groups.members)
    for number in range(2 * MAX_COUNTED):
        groups.used(["x", str(number)])
    assert len(groups.state()["seen"]) == MAX_COUNTED
    many = [str(number) for number in range(2 * MAX_MEMBERS)]
    for _ in range(MIN_USES_TOGETHER):
        groups.used(many)
    assert max(len(members) for members in groups.members.values()) == MAX_MEMBERS
    again = Groups()
    again.restore(groups.state())
    assert again.state() == groups.state() and again.members == groups.members


def test_an_empty_list_of_memories_is_not_counted_as_a_use(qwen3: HFBackend) -> None:
    with pytest.raises(UnknownMemoryError, match="No text memory is given"):
        scheduler_on(qwen3).observe([], QUERY)
