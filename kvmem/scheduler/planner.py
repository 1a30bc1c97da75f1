"""Turns a policy's ranking into builds, promotions, demotions and evictions that respect the budgets."""

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
    """One step of a plan. `source` and `target` are tiers.

    `source` is None for a build, and for the admission of KV that an answer computed; `target` for an eviction.
    """

    kind: Literal["build", "admit", "promote", "demote", "evict"]
    memory_id: str
    source: str | None
    target: str | None


def check_budgets(budgets: Mapping[str, int]) -> None:
    """Raises ConfigError unless there is a tier and every budget is a number of bytes."""
    if not budgets or not all(isinstance(most, int) and most >= 0 for most in budgets.values()):
        raise ConfigError(f"budget is {dict(budgets)!r}. Give bytes by tier, fastest first: {{'ram': 1 << 30}}.")


class Planner:
    """Counts uses and edits, estimates the value of every memory, and fills the tiers in the policy's order.

    It holds no KV and reads no clock: the scheduler executes its moves, and the simulator accounts for their costs.
    It evicts only when space is needed, so a plan can be stopped after any move.
    """

    def __init__(
        self,
        policy: Policy,
        budgets: Mapping[str, int],
        costs: Costs,
        size: Callable[[str, int], int] | None = None,
        loads: LoadEstimator | None = None,
    ) -> None:
        """budgets: bytes by tier, fastest first. size(tier, tokens): bytes of `tokens` in a tier; None: the same in
        each. loads: predicts load times; None: as given in `costs`. Raises ConfigError for budgets that are not bytes.
        """
        check_budgets(budgets)
        self.policy, self.budgets = policy, dict(budgets)
        self.level = {name: level for level, name in enumerate(self.budgets)}
        self.table = UsageTable()
        self._size = size or (lambda tier, tokens: int(costs.nbytes(tokens)))
        self.loads = loads or LoadEstimator(costs)
        self.pinned: Collection[str] = ()
        """What is kept before everything else, whatever the policy says."""
        self.heads: dict[str, list[str]] = {}
        """Group -> what it begins with, shortest first: the group's KV contains the KV of each."""
        self.query_tokens = 0.0
        """Mean length of the observed queries, in tokens."""

    @property
    def costs(self) -> Costs:
        """The costs that plans are made with, which are those of `loads`."""
        return self.loads.costs

    def used(self, memory_id: str, query_tokens: int) -> None:
        """Counts one use of a memory by a query of `query_tokens` tokens."""
        row = self.table.track(memory_id)
        self.policy.observed(self.table, row)
        self.table.used(memory_id)
        self.query_tokens += (query_tokens - self.query_tokens) / self.table.now

    def edited(self, memory_id: str) -> None:
        """Counts one edit of a memory."""
        self.table.edited(memory_id)

    def sized(self, memory_id: str, tokens: int) -> None:
        """Sets the current length of a memory; 0 if it can't be stored."""
        row = self.table.track(memory_id)
        self.table.tokens[row], self.table.nbytes[row] = tokens, self.costs.nbytes(tokens) if tokens else 0

    def forget(self, memory_id: str) -> None:
        """Removes a memory or a group and its counts. Unknown ids are ignored."""
        self.heads.pop(memory_id, None)
        row = self.table.row_of.get(memory_id)
        if row is not None:
            self.policy.forgotten(self.table, row)
            self.table.forget(memory_id)

    def joined(self, group: str, heads: Sequence[str]) -> None:
        """Plans a group of memories as one memory from now on. heads: what it begins with, shortest first."""
        self.heads[group] = list(heads)

    def price(self, tier_of: Mapping[str, str]) -> None:
        """Sets each memory's build time and the time that a use of it saves, for the mean query so far.

        A group that is not built saves only what it saves beyond its longest head that has KV. A head saves nothing if
        a group with it is in an equally fast tier and loading the whole group pays for the head's tokens alone.
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
        """The moves from the current tiers (`tier_of`: memory -> tier) towards those that the policy wants.

        barred: memories that must not be built now. lost: bytes by tier that are unavailable although nothing uses
        them, such as files that could not be deleted.
        """
        self.price(tier_of)
        table = self.table
        held = self._held(tier_of)
        order = self._rank(held, sum(self.budgets.values()))
        if barred:
            order = order[[held[row] or table.ids[row] not in barred for row in order.tolist()]]
        free = {tier: most - (lost or {}).get(tier, 0) for tier, most in self.budgets.items()}
        wanted = self._fill(table, order, free)
        place_of = dict(tier_of)
        for memory_id, tier in place_of.items():
            free[tier] -= self._nbytes(memory_id, tier)
        rank = {table.ids[row]: at for at, row in enumerate(order)}
        moves: list[Move] = []
        builds = 0
        for memory_id, tier in wanted.items():
            source = place_of.get(memory_id)
            if source == tier or (source is None and builds == max_builds):
                continue
            nbytes = self._nbytes(memory_id, tier)
            moves += self._free_up(tier, nbytes, wanted, place_of, free, rank)
            if free[tier] < nbytes:
                continue
            builds += source is None
            moves.append(self._move(memory_id, tier, place_of, free))
        return moves

    def admit(
        self,
        memory_id: str,
        tier_of: Mapping[str, str],
        lost: Mapping[str, int] | None = None,
        write_s: Callable[[str, int], float] = lambda tier, nbytes: 0.0,
    ) -> list[Move]:
        """The moves that keep KV of a memory that an answer has just computed; none if it is not worth its bytes.

        It costs no build, only its write. Otherwise it is ranked as every other memory: while there is space, its first
        use is enough; when a tier is full, it replaces only what the policy ranks below it. Demotions and evictions
        come first, the admission is last.

        tier_of, lost: as in `plan`. write_s(tier, nbytes): seconds to write `nbytes` to the tier.
        """
        row = self.table.row_of.get(memory_id)
        if row is None or not self.table.tokens[row] or memory_id in tier_of:
            return []
        self.price(tier_of)
        held = self._held(tier_of)
        free = {tier: most - (lost or {}).get(tier, 0) for tier, most in self.budgets.items()}
        cost_s, tier = 0.0, ""
        while True:  # the write costs what it costs in the tier that is chosen
            self.table.build_s[row] = cost_s
            order = self._rank(held, sum(self.budgets.values()))
            wanted = self._fill(self.table, order, free)
            if memory_id not in wanted:
                return []
            if wanted[memory_id] == tier:
                break
            tier = wanted[memory_id]
            nbytes = self._nbytes(memory_id, tier)
            cost_s = max(cost_s, write_s(tier, nbytes))
            if not self._pays(memory_id, tier):
                return []  # it would not be loaded
        place_of = dict(tier_of)
        for id_, at in place_of.items():
            free[at] -= self._nbytes(id_, at)
        rank = {self.table.ids[row]: at for at, row in enumerate(order)}
        moves = self._free_up(tier, nbytes, wanted, place_of, free, rank)
        if free[tier] < nbytes:
            return []
        self._move(memory_id, tier, place_of, free)
        return [*moves, Move("admit", memory_id, None, tier)]

    def spill(
        self,
        tier_of: Mapping[str, str],
        lasting: Collection[str],
        lost: Mapping[str, int] | None = None,
        write_s: Callable[[str, int], float] = lambda tier, nbytes: 0.0,
    ) -> list[Move]:
        """The moves that keep what is worth its bytes when all tiers but the `lasting` ones end.

        What is in another tier costs its write, and is ranked with what is in a lasting tier already. Nothing is built.

        tier_of, lost: as in `plan`. write_s: as in `admit`.
        """
        budgets = {tier: most if tier in lasting else 0 for tier, most in self.budgets.items()}
        first = next((tier for tier, most in budgets.items() if most), "")
        if not first:
            return []
        self.price(tier_of)
        for memory_id, tier in tier_of.items():
            if tier not in lasting:
                self.table.build_s[self.table.row_of[memory_id]] = write_s(first, self._nbytes(memory_id, first))
        held = self._held({memory_id: tier for memory_id, tier in tier_of.items() if tier in lasting})
        order = self._rank(held, sum(budgets.values()))
        order = order[[self.table.ids[row] in tier_of for row in order.tolist()]]
        free = {tier: most - (lost or {}).get(tier, 0) for tier, most in budgets.items()}
        wanted = {
            memory_id: tier
            for memory_id, tier in self._fill(self.table, order, free).items()
            if tier_of[memory_id] in lasting or self._pays(memory_id, tier)
        }
        rank = {self.table.ids[row]: at for at, row in enumerate(order)}
        place_of = dict(tier_of)
        for memory_id, tier in place_of.items():
            free[tier] -= self._nbytes(memory_id, tier)
        moves: list[Move] = []
        for memory_id, tier in wanted.items():
            if place_of.get(memory_id) in lasting:
                continue
            nbytes = self._nbytes(memory_id, tier)
            moves += self._free_up(tier, nbytes, wanted, place_of, free, rank)
            if free[tier] >= nbytes:
                moves.append(self._move(memory_id, tier, place_of, free))
        return moves

    def _pays(self, memory_id: str, tier: str) -> bool:
        """Whether a use would load the memory from the tier instead of computing it, or it is pinned."""
        if memory_id in self.pinned:
            return True
        saved_s = float(self.table.saved_s[self.table.row_of[memory_id]])
        return self.loads.load_s(tier, self._nbytes(memory_id, tier)) < saved_s

    def explain(self, memory_id: str, tier_of: Mapping[str, str]) -> str:
        """A memory's rank among all, with the numbers behind it."""
        self.price(tier_of)
        held = self._held(tier_of)
        row = self.table.row_of[memory_id]
        order = self._rank(held, sum(self.budgets.values())).tolist()
        rank = f"rank {order.index(row) + 1} of {len(self.table)}" if row in order else "not worth its bytes"
        rank += ", pinned" if memory_id in self.pinned else ""
        return f"{rank}: {self.policy.explain(self.table, row, bool(held[row]))}"

    def state(self) -> dict[str, Any]:
        """Counts and what the policy has learned, as plain values for a file."""
        return {
            "policy": self.policy.name,
            "learned": self.policy.state(),
            "query_tokens": self.query_tokens,
            "table": self.table.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Ignores what another policy has learned, and keeps its counts.

        Raises KeyError, TypeError or ValueError for a state that is damaged. What could be read is then used.
        """
        table, query_tokens = UsageTable.of_state(state["table"]), float(state["query_tokens"])
        if not 0 <= query_tokens < np.inf:
            raise ValueError(f"query_tokens is {query_tokens}")
        self.table, self.query_tokens = table, query_tokens
        if state["policy"] == self.policy.name:
            self.policy.restore(state["learned"])

    def _rank(self, held: np.ndarray, budget_bytes: int) -> np.ndarray:
        """The rows to keep, best first: what is pinned, and then what the policy ranks."""
        order = self.policy.rank(self.table, held, budget_bytes)
        pinned = [self.table.row_of[id_] for id_ in sorted(self.pinned) if id_ in self.table.row_of]
        pinned = [row for row in pinned if self.table.tokens[row]]
        if not pinned:
            return order
        place = {row: at for at, row in enumerate(order.tolist())}
        pinned.sort(key=lambda row: place.get(row, len(place)))
        return np.concatenate([np.array(pinned, dtype=order.dtype), order[~np.isin(order, pinned)]])

    def _held(self, tier_of: Mapping[str, str]) -> np.ndarray:
        held = np.zeros(len(self.table), dtype=bool)
        held[[self.table.row_of[memory_id] for memory_id in tier_of]] = True
        return held

    def _fill(self, table: UsageTable, order: np.ndarray, budgets: Mapping[str, int]) -> dict[str, str]:
        """Memory -> the tier where it should be, best first."""
        free = dict(budgets)
        wanted: dict[str, str] = {}
        tokens_of = table.tokens[order].astype(int).tolist()
        shortest = min(tokens_of, default=0)
        smallest = {name: self._size(name, shortest) for name in free}
        for row, tokens in zip(order.tolist(), tokens_of, strict=True):
            if all(left < smallest[name] for name, left in free.items()):
                break
            tier = next((name for name, left in free.items() if self._size(name, tokens) <= left), None)
            if tier is not None:
                free[tier] -= self._size(tier, tokens)
                wanted[table.ids[row]] = tier
        return wanted

    def _free_up(
        self,
        tier: str,
        nbytes: int,
        wanted: Mapping[str, str],
        place_of: dict[str, str],
        free: dict[str, int],
        rank: Mapping[str, int],
    ) -> list[Move]:
        """Moves that free `nbytes` of `tier`: demotes or evicts what is not wanted there, the worst first."""
        moves: list[Move] = []
        if free[tier] >= nbytes:
            return moves
        unwanted = [memory_id for memory_id, at in place_of.items() if at == tier and wanted.get(memory_id) != tier]
        for victim in sorted(unwanted, key=lambda memory_id: rank.get(memory_id, len(rank)), reverse=True):
            below = wanted.get(victim)
            lower = below is not None and self.level[below] > self.level[tier]
            fits = below is not None and lower and free[below] >= self._nbytes(victim, below)
            moves.append(self._move(victim, below if fits else None, place_of, free))
            if free[tier] >= nbytes:
                break
        return moves

    def _nbytes(self, memory_id: str, tier: str) -> int:
        return self._size(tier, int(self.table.tokens[self.table.row_of[memory_id]]))

    def _move(self, memory_id: str, target: str | None, place_of: dict[str, str], free: dict[str, int]) -> Move:
        """Updates `place_of` and `free` for a move, and returns it."""
        source = place_of.pop(memory_id, None)
        if source is not None:
            free[source] += self._nbytes(memory_id, source)
        if target is None:
            return Move("evict", memory_id, source, None)
        place_of[memory_id] = target
        free[target] -= self._nbytes(memory_id, target)
        if source is None:
            return Move("build", memory_id, None, target)
        return Move("promote" if self.level[target] < self.level[source] else "demote", memory_id, source, target)
