"""From a policy's ranking to moves: what to build, promote, demote and evict, in an order that keeps the budgets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kvmem.errors import ConfigError
from kvmem.scheduler.cost_model import Costs, LoadEstimator
from kvmem.scheduler.policies import Policy
from kvmem.scheduler.usage import UsageTable


@dataclass(frozen=True)
class Move:
    """One step. `source` is None for a build, `target` None for an eviction; tiers by name."""

    kind: Literal["build", "promote", "demote", "evict"]
    memory_id: str
    source: str | None
    target: str | None


def check_budgets(budgets: Mapping[str, int]) -> None:
    """Raises ConfigError unless there is a tier and every budget is a number of bytes."""
    if not budgets or not all(isinstance(most, int) and most >= 0 for most in budgets.values()):
        raise ConfigError(f"budget is {dict(budgets)!r}. Give bytes by tier, fastest first: {{'ram': 1 << 30}}.")


class Planner:
    """Counts uses and edits, prices every memory, and fills the tiers in the policy's order, fastest first.

    It holds no KV and reads no clock: the scheduler carries its moves out, and the simulator books what they cost.
    Nothing leaves before its place is needed, so a plan cut short after any move has lost nothing for nothing.
    """

    def __init__(
        self,
        policy: Policy,
        budgets: Mapping[str, int],
        costs: Costs,
        size: Callable[[str, int], int] | None = None,
        loads: LoadEstimator | None = None,
    ) -> None:
        """budgets: bytes by tier, fastest first. size(tier, tokens): bytes of so many tokens in a tier; None: the same
        in each tier. loads: what loads take; None: what `costs` says.
        """
        check_budgets(budgets)
        self.policy, self.budgets, self.costs = policy, dict(budgets), costs
        self.level = {name: level for level, name in enumerate(self.budgets)}
        self.table = UsageTable()
        self._size = size or (lambda tier, tokens: tokens * costs.kv_bytes_a_token)
        self.loads = loads or LoadEstimator(costs)
        self.heads: dict[str, list[str]] = {}
        """Groups of memories, and what each begins with, shortest first: KV of those is in the group's KV too."""
        self.query_tokens = 0.0
        """Mean length of the queries seen."""

    def used(self, memory_id: str, query_tokens: int) -> None:
        """One use of a memory by a query of `query_tokens`."""
        row = self.table.track(memory_id)
        self.policy.observed(self.table, row)
        self.table.used(memory_id)
        self.query_tokens += (query_tokens - self.query_tokens) / self.table.now

    def edited(self, memory_id: str) -> None:
        self.table.edited(memory_id)

    def sized(self, memory_id: str, tokens: int) -> None:
        """The length of a memory as it now is; 0: it can't be stored."""
        row = self.table.track(memory_id)
        self.table.tokens[row], self.table.nbytes[row] = tokens, tokens * self.costs.kv_bytes_a_token

    def joined(self, group: str, heads: Sequence[str]) -> None:
        """Plans a group of memories as one memory from here on. heads: what it begins with, shortest first."""
        self.heads[group] = list(heads)

    def price(self, tier_of: Mapping[str, str]) -> None:
        """Sets what each memory costs to build and what a use of it saves, for the queries seen so far.

        A group's KV saves what it saves beyond the longest of its heads that has KV; and a head nothing, where the
        group's KV is as near and its load, which is the whole group's, pays for the head's tokens alone.
        """
        n = len(self.table)
        tokens = self.table.tokens[:n]
        self.table.build_s[:n] = self.costs.prefill_s(tokens)
        saved_s = self.costs.saved_s(tokens, self.query_tokens)
        self.table.saved_s[:n] = saved_s
        row_of = self.table.row_of
        for group, heads in self.heads.items():
            longest = next((head for head in reversed(heads) if head in tier_of), None)
            if longest is not None and group not in tier_of:
                self.table.saved_s[row_of[group]] = max(0.0, saved_s[row_of[group]] - saved_s[row_of[longest]])
        for group in self.heads.keys() & tier_of.keys():
            tier = tier_of[group]
            load_s = self.loads.load_s(tier, self._nbytes(group, tier))
            for head in self.heads[group]:
                near = self.level[tier] <= self.level[tier_of.get(head, tier)]
                if near and head in row_of and load_s < saved_s[row_of[head]]:
                    self.table.saved_s[row_of[head]] = 0.0

    def plan(
        self,
        tier_of: Mapping[str, str],
        max_builds: int,
        barred: Collection[str] = (),
        lost: Mapping[str, int] | None = None,
    ) -> list[Move]:
        """The moves from where things are (`tier_of`: memory -> tier) towards where the policy wants them.

        barred: memories that are not to be built now. lost: bytes by tier that are in nobody's use and not to be had.
        """
        self.price(tier_of)
        table = self.table
        held = self._held(tier_of)
        order = self.policy.rank(table, held, sum(self.budgets.values()))
        if barred:
            order = order[[held[row] or table.ids[row] not in barred for row in order.tolist()]]
        free = {tier: most - (lost or {}).get(tier, 0) for tier, most in self.budgets.items()}
        wanted = self._fill(table, order, free)
        place = dict(tier_of)
        for memory_id, tier in place.items():
            free[tier] -= self._nbytes(memory_id, tier)
        rank = {table.ids[row]: at for at, row in enumerate(order)}
        moves: list[Move] = []
        builds = 0
        for memory_id, tier in wanted.items():
            source = place.get(memory_id)
            if source == tier or (source is None and builds == max_builds):
                continue
            nbytes = self._nbytes(memory_id, tier)
            moves += self._make_room(tier, nbytes, wanted, place, free, rank)
            if free[tier] < nbytes:
                continue
            builds += source is None
            moves.append(self._move(memory_id, tier, place, free))
        return moves

    def explain(self, memory_id: str, tier_of: Mapping[str, str]) -> str:
        """The numbers behind a memory's place, and its rank among all."""
        self.price(tier_of)
        held = self._held(tier_of)
        row = self.table.row_of[memory_id]
        order = self.policy.rank(self.table, held, sum(self.budgets.values())).tolist()
        rank = f"rank {order.index(row) + 1} of {len(self.table)}" if row in order else "not worth its bytes"
        return f"{rank}: {self.policy.explain(self.table, row, bool(held[row]))}"

    def state(self) -> dict[str, Any]:
        """Counts and what the policy has learned, as plain values."""
        return {
            "policy": self.policy.name,
            "learned": self.policy.state(),
            "query_tokens": self.query_tokens,
            "table": self.table.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave; what another policy had learned is left out, its counts are not."""
        self.table, self.query_tokens = UsageTable.of_state(state["table"]), state["query_tokens"]
        if state["policy"] == self.policy.name:
            self.policy.restore(state["learned"])

    def _held(self, tier_of: Mapping[str, str]) -> np.ndarray:
        held = np.zeros(len(self.table), dtype=bool)
        held[[self.table.row_of[memory_id] for memory_id in tier_of]] = True
        return held

    def _fill(self, table: UsageTable, order: np.ndarray, budgets: Mapping[str, int]) -> dict[str, str]:
        """Memory -> the tier where it should be, best first."""
        room = dict(budgets)
        wanted: dict[str, str] = {}
        tokens_of = table.tokens[order].astype(int).tolist()
        shortest = min(tokens_of, default=0)
        least = {name: self._size(name, shortest) for name in room}
        for row, tokens in zip(order.tolist(), tokens_of, strict=True):
            if all(left < least[name] for name, left in room.items()):
                break
            tier = next((name for name, left in room.items() if self._size(name, tokens) <= left), None)
            if tier is not None:
                room[tier] -= self._size(tier, tokens)
                wanted[table.ids[row]] = tier
        return wanted

    def _make_room(
        self,
        tier: str,
        nbytes: int,
        wanted: Mapping[str, str],
        place: dict[str, str],
        free: dict[str, int],
        rank: Mapping[str, int],
    ) -> list[Move]:
        """Moves that free `nbytes` of `tier`: out of it goes what is not wanted there, worst first, down or away."""
        moves: list[Move] = []
        if free[tier] >= nbytes:
            return moves
        strangers = [memory_id for memory_id, at in place.items() if at == tier and wanted.get(memory_id) != tier]
        for victim in sorted(strangers, key=lambda memory_id: rank.get(memory_id, len(rank)), reverse=True):
            below = wanted.get(victim)
            lower = below is not None and self.level[below] > self.level[tier]
            fits = below is not None and lower and free[below] >= self._nbytes(victim, below)
            moves.append(self._move(victim, below if fits else None, place, free))
            if free[tier] >= nbytes:
                break
        return moves

    def _nbytes(self, memory_id: str, tier: str) -> int:
        return self._size(tier, int(self.table.tokens[self.table.row_of[memory_id]]))

    def _move(self, memory_id: str, target: str | None, place: dict[str, str], free: dict[str, int]) -> Move:
        """Books the move, and says what kind it is."""
        source = place.pop(memory_id, None)
        if source is not None:
            free[source] += self._nbytes(memory_id, source)
        if target is None:
            return Move("evict", memory_id, source, None)
        place[memory_id] = target
        free[target] -= self._nbytes(memory_id, target)
        if source is None:
            return Move("build", memory_id, None, target)
        return Move("promote" if self.level[target] < self.level[source] else "demote", memory_id, source, target)
