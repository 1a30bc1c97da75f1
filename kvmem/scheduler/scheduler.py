"""MemScheduler: which text memories are kept as KV, and where, ahead of the queries that will want them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Self

from kvmem.cache import CacheView, TextualMemoryItem
from kvmem.engines import Generation, Sampling
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import (
    BudgetError,
    BuildCancelled,
    ClosedError,
    ConfigError,
    KVMemError,
    StorageError,
    UnknownMemoryError,
    check_kind,
)
from kvmem.memory import KVCacheMemory
from kvmem.prompt import Query
from kvmem.scheduler.backoff import RetryBackoff
from kvmem.scheduler.build_gate import BuildGate
from kvmem.scheduler.cost_model import Costs, LoadEstimator
from kvmem.scheduler.journal import Journal
from kvmem.scheduler.kv_index import KVIndex
from kvmem.scheduler.observations import ObservationQueue, TextMemories, text_memories_of
from kvmem.scheduler.planner import Move, Planner, check_budgets
from kvmem.scheduler.policies import Policy
from kvmem.scheduler.policies import policy as policy_by_name
from kvmem.scheduler.prefix_selection import PrefixSelector
from kvmem.tiers import TieredCache


class MemScheduler:
    """observe -> tick (take in, plan, carry out) -> answer. What can't be built stays text, named in `failures`."""

    def __init__(
        self,
        memory: KVCacheMemory,
        policy: Policy | str,
        budget: Mapping[str, int],
        folder: str | Path | None = None,
        costs: Costs | None = None,
        max_builds: int = 1,
        cold: str | None = None,
    ) -> None:
        """budget: bytes by tier, fastest first (`gpu`, `ram`, `disk`, `cold`). folder: for the state and the disk tier;
        None: the state ends with the process. costs: what prefilling takes here; None: measured. max_builds: in one
        tick. cold: the URL of the cold tier. `disk_int8` and `disk_int4` in a budget lose, and answers say so.
        Raises ArgumentError or ConfigError for what is of another kind, or a value that is not allowed.
        """
        for name, given, kinds in (
            ("memory", memory, (KVCacheMemory,)),
            ("policy", policy, (Policy, str)),
            ("budget", budget, (Mapping,)),
            ("folder", folder, (str, PathLike, type(None))),
            ("costs", costs, (Costs, type(None))),
            ("max_builds", max_builds, (int,)),
            ("cold", cold, (str, type(None))),
        ):
            way_out = "Give bytes by tier, fastest first: {'ram': 1 << 30}." if name == "budget" else ""
            check_kind(f"MemScheduler's {name}", given, *kinds, way_out=way_out)
        if max_builds < 0:
            raise ConfigError(f"max_builds is {max_builds}. Give 0 or more.")
        if not isinstance(memory.backend, HFBackend) or memory.backend.ranks > 1:  # each rank would plan for itself
            raise ConfigError(
                f"MemScheduler needs the backend huggingface or hf_graph, and has {type(memory.backend).name}."
            )
        self.backend = memory.backend
        chosen = policy_by_name(policy) if isinstance(policy, str) else policy
        check_budgets(budget)
        costs = costs or Costs.measured(self.backend)
        self.journal = Journal(Path(folder)) if folder is not None else None
        self.items = TieredCache(self.backend, budget, None if folder is None else Path(folder) / "kv", cold)
        self.index = KVIndex(self.backend, self.items, memory.config.separator)
        loads = LoadEstimator(costs, self.items.loads)
        self.planner = Planner(chosen, budget, costs, self.items.size, loads)
        self.prefix_selector = PrefixSelector(self.index, loads)
        self.failures = RetryBackoff()
        self.builds = self.cancelled_builds = 0
        self.failed_ticks, self.last_failed_tick = 0, ""
        """Ticks of the thread that ended in an error, and the last one's: the thread goes on."""
        self.gate = BuildGate()
        self._max_builds = max_builds
        self._building: str | None = None
        self._ticking = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.observations = ObservationQueue(self.planner, self.index, self.failures, self.journal)
        self.index.adopt()

    def observe(self, memories: TextMemories, query: Query) -> None:
        """A query used this text memory, or these in this order. Returns at once; what follows is done in `tick`.

        Memories that are often used together are planned as one: their joined KV, where it pays, in that order.
        """
        used = text_memories_of(memories)
        self._check_open()
        self.backend.template.check_query(query)
        text = query if isinstance(query, str) else "\n".join(turn["content"] for turn in query)
        query_tokens = len(self.backend.tokenizer(text, add_special_tokens=False).input_ids)
        for changed in self.observations.use(used, query_tokens):
            self._call_off(changed)
        self._wake.set()

    def update(self, text_memory: TextualMemoryItem) -> None:
        """A text changed: its KV is served no more from here on, and a running build of it is called off."""
        (changed,) = text_memories_of([text_memory])
        self._check_open()
        if self.observations.text(changed):
            self._call_off(text_memory.id)
        self._wake.set()

    def _call_off(self, changed: str) -> None:
        building = self._building
        if building is not None and changed in self.index.members(building):
            self.gate.cancel()

    def answer(
        self,
        query: Query,
        text_memories: TextMemories,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Generation:
        """Answers behind the longest stored prefix, prefills the rest as text, and observes the use.

        The answer's `note` says so where a memory's KV was there and was not loaded, since prefilling is sooner done;
        its `lossy`, where the KV had been in a compressed tier.
        """
        used = text_memories_of(text_memories)
        with self.view(used) as cache:
            generation = self.backend.generate(query, cache, max_new_tokens, sampling)
        if not self._closing.is_set():  # closed meanwhile: the answer is no less one
            self.observe(used, query)
        return generation

    @contextmanager
    def view(self, text_memories: TextMemories) -> Iterator[CacheView]:
        """The cache that `answer` uses, for a block in which builds stand aside. Observes nothing."""
        with self.gate.request(), self.prefix_selector.view(text_memories_of(text_memories)) as cache:
            yield cache

    def tick(self) -> list[Move]:
        """Takes in what was observed, plans, and carries the plan out; the moves that were made. One tick at a time."""
        with self._ticking:
            self.observations.take_in()
            if not self._closing.is_set():  # what is left in the tiers may be another process's by then
                self.items.pending_deletes.retry()
            barred = self.failures.barred(self.planner.table.now)
            made, lost = [], self.items.pending_deletes.by_tier()
            for move in self.planner.plan(self.index.tiers(), self._max_builds, barred, lost):
                if not self._closing.is_set() and self._carry_out(move):
                    made.append(move)
            self.prefix_selector.probe()
            self.observations.snapshot()
            return made

    def explain(self, memory_id: str) -> str:
        """Why a memory is where it is, in one line with its numbers. Raises UnknownMemoryError."""
        check_kind("A memory's id", memory_id, str, way_out="Give the id of a text memory.")
        with self._ticking:
            self.observations.take_in()
            if memory_id not in self.index.texts and memory_id not in self.index.groups.members:
                raise UnknownMemoryError(f"Never observed: {memory_id}. Observed: {len(self.index.texts)} memories.")
            tiers = self.index.tiers()
            place = f"in {tiers[memory_id]}" if memory_id in tiers else "text"
            why = self.planner.explain(memory_id, tiers) + self.prefix_selector.explain(memory_id)
            why += self.failures.explain(memory_id) + self.items.pending_deletes.explain(memory_id)
            return f"{memory_id} is {place}. {why}"

    def start(self, interval_s: float = 0.5) -> None:
        """Ticks in a thread of its own: after an observation, and every `interval_s` seconds at least.

        Raises ConfigError for an interval that is not positive, or where that thread runs already.
        """
        check_kind("interval_s", interval_s, int, float, way_out="Give seconds.")
        self._check_open()
        if not interval_s > 0 or self._thread is not None:
            why = "This scheduler ticks already" if self._thread is not None else f"interval_s is {interval_s}"
            raise ConfigError(f"{why}. Call start once, with seconds above 0.")

        def loop() -> None:
            while not self._closing.is_set():
                self._wake.wait(interval_s)
                self._wake.clear()
                if self._closing.is_set():
                    return
                try:
                    self.tick()
                except (KVMemError, OSError) as error:  # a full disk, say; what it left undone the next tick plans
                    self.failed_ticks += 1
                    self.last_failed_tick = f"{type(error).__name__}: {error}"

        self._thread = threading.Thread(target=loop, name="MemScheduler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Calls off a running build, ends the thread and writes the state, as leaving a `with` block does; once."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        self.gate.cancel()
        if self._thread is not None:
            self._thread.join()
        with self._ticking, closing(self.items), closing(self.journal) if self.journal is not None else nullcontext():
            self.observations.take_in()
            self.observations.snapshot(every=0)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise ClosedError("This scheduler is closed. Make another: with the same folder it goes on as this did.")

    def _carry_out(self, move: Move) -> bool:
        if move.target is None:
            return self.index.evict(move.memory_id)
        if move.source is None:
            return self._build(move.memory_id, move.target)
        try:
            return self.index.move(move.memory_id, move.target)
        except BudgetError:  # what should have left is in use; the next tick plans anew
            return False
        except StorageError as error:
            self.failures.add(move.memory_id, error, self.planner.table.now)
            return False

    def _build(self, memory_id: str, tier: str) -> bool:
        tokens = int(self.planner.table.tokens[self.planner.table.row_of[memory_id]])
        if self.items.size(tier, tokens) > self.items.budgets[tier] - self.items.used_bytes()[tier]:
            return False  # what should have left is in use; the next tick plans anew
        try:
            with self.gate.build() as between_layers:
                self._building = memory_id
                if self._closing.is_set():
                    return False
                texts = self.index.texts_of(memory_id)
                item = self.index.build(memory_id, texts, between_layers)
            stored = self.index.store(memory_id, texts, item, tier)
        except BuildCancelled:
            self.cancelled_builds += 1
            return False
        except (KVMemError, RuntimeError, OSError) as error:  # RuntimeError: torch's own, out of memory among them
            self.failures.add(memory_id, error, self.planner.table.now)
            return False
        finally:
            self._building = None
        self.builds += 1
        self.failures.pop(memory_id, None)
        return stored
