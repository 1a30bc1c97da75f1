"""MemScheduler: keeps text memories as KV ahead of the queries that will use them."""

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
    """observe -> tick (count, plan, execute) -> answer.

    A memory that can't be built is answered as text, and `failures` says why.
    """

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
        """budget: bytes by tier, fastest first (`gpu`, `ram`, `disk`, `cold`). The tiers `disk_int8` and `disk_int4`
        are lossy, and answers say so. folder: for the state and the disk tiers; None: the state ends with the process.
        With a namespace, a folder of that name in it is used, and likewise at the URL of the cold tier.
        costs: prefill and load times; None: measured now. max_builds: at most so many builds in a tick. cold: the URL
        of the cold tier.

        Raises ArgumentError for an argument of the wrong type, ConfigError for a bad value, and StorageError if the
        folder can't be used.
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
        if not isinstance(memory.backend, HFBackend) or memory.backend.ranks > 1:  # each rank would plan on its own
            raise ConfigError(
                f"MemScheduler needs the backend huggingface or hf_graph, and has {type(memory.backend).name}."
            )
        self.backend = memory.backend
        if namespace := memory.config.namespace:  # its state and its KV apart from those of other namespaces
            folder = None if folder is None else Path(folder) / namespace
            cold = None if cold is None else f"{cold.rstrip('/')}/{namespace}"
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
        """Ticks of the thread that ended in an error, and the last error. The thread continues."""
        self.gate = BuildGate()
        self._max_builds = max_builds
        self._building: str | None = None
        self._ticking = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.observations = ObservationQueue(self.planner, self.index, self.failures, self.journal)
        self.index.adopt()

    def observe(self, memories: TextMemories, query: Query) -> None:
        """Records that a query used this text memory, or these in this order. Returns at once; `tick` does the rest.

        Memories that are often used together in one order are planned as a group with joint KV.
        """
        used = text_memories_of(memories)
        self._check_open()
        self.backend.template.check_query(query)
        text = query if isinstance(query, str) else "\n".join(turn["content"] for turn in query)
        query_tokens = len(self.backend.tokenizer(text, add_special_tokens=False).input_ids)
        for changed in self.observations.use(used, query_tokens):
            self._cancel_build_of(changed)
        self._wake.set()

    def update(self, text_memory: TextualMemoryItem) -> None:
        """Sets a memory's text. KV of the old text is no longer served, and a running build of it is cancelled."""
        (changed,) = text_memories_of([text_memory])
        self._check_open()
        if self.observations.set_text(changed):
            self._cancel_build_of(text_memory.id)
        self._wake.set()

    def _cancel_build_of(self, changed: str) -> None:
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
        """Answers with the stored prefix that saves most, prefills the rest as text, and observes the use.

        If stored KV was not loaded, for example because prefilling is faster, the answer's `note` says so. If the KV
        comes from a quantized tier, `lossy` names its form.
        """
        used = text_memories_of(text_memories)
        with self.view(used) as cache:
            generation = self.backend.generate(query, cache, max_new_tokens, sampling)
        if not self._closing.is_set():  # closed meanwhile: the answer is still valid
            self.observe(used, query)
        return generation

    @contextmanager
    def view(self, text_memories: TextMemories) -> Iterator[CacheView]:
        """The cache that `answer` uses, valid inside the block. Builds wait meanwhile. Observes nothing."""
        with self.gate.request(), self.prefix_selector.view(text_memories_of(text_memories)) as cache:
            yield cache

    def tick(self) -> list[Move]:
        """Counts what was observed, plans, and executes the plan. Returns the moves that were made.

        One tick runs at a time.
        """
        with self._ticking:
            self.observations.count()
            if not self._closing.is_set():  # after closing, the tiers may belong to another process
                self.items.pending_deletes.retry()
            barred = self.failures.barred(self.planner.table.now)
            made, lost = [], self.items.pending_deletes.by_tier()
            for move in self.planner.plan(self.index.tiers(), self._max_builds, barred, lost):
                if not self._closing.is_set() and self._execute(move):
                    made.append(move)
            self.prefix_selector.probe()
            self.observations.snapshot()
            return made

    def explain(self, memory_id: str) -> str:
        """Why a memory is in its tier, in one line with the numbers. Raises UnknownMemoryError."""
        check_kind("A memory's id", memory_id, str, way_out="Give the id of a text memory.")
        with self._ticking:
            self.observations.count()
            if memory_id not in self.index.texts and memory_id not in self.index.groups.members:
                raise UnknownMemoryError(f"Never observed: {memory_id}. Observed: {len(self.index.texts)} memories.")
            tiers = self.index.tiers()
            where = f"in {tiers[memory_id]}" if memory_id in tiers else "text"
            why = self.planner.explain(memory_id, tiers) + self.prefix_selector.explain(memory_id)
            why += self.failures.explain(memory_id) + self.items.pending_deletes.explain(memory_id)
            return f"{memory_id} is {where}. {why}"

    def start(self, interval_s: float = 0.5) -> None:
        """Starts a thread that ticks after each observation, and at least every `interval_s` seconds.

        Raises ConfigError if the interval is not positive or the thread already runs.
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
                except (KVMemError, OSError) as error:  # such as a full disk; the next tick plans again
                    self.failed_ticks += 1
                    self.last_failed_tick = f"{type(error).__name__}: {error}"

        self._thread = threading.Thread(target=loop, name="MemScheduler", daemon=True)
        self._thread.start()

    @property
    def is_ticking(self) -> bool:
        """Whether the thread of `start` runs."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Cancels a running build, ends the thread and writes the state. Later calls do nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        self.gate.cancel()
        if self._thread is not None:
            self._thread.join()
        with self._ticking, closing(self.items), closing(self.journal) if self.journal is not None else nullcontext():
            self.observations.count()
            self.observations.snapshot(every=0)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise ClosedError("This scheduler is closed. Make another: with the same folder it goes on as this did.")

    def _execute(self, move: Move) -> bool:
        if move.target is None:
            return self.index.evict(move.memory_id)
        if move.source is None:
            return self._build(move.memory_id, move.target)
        try:
            return self.index.move(move.memory_id, move.target)
        except BudgetError:  # an item that should have left is in use; the next tick plans again
            return False
        except StorageError as error:
            self.failures.add(move.memory_id, error, self.planner.table.now)
            return False

    def _build(self, memory_id: str, tier: str) -> bool:
        tokens = int(self.planner.table.tokens[self.planner.table.row_of[memory_id]])
        if self.items.size(tier, tokens) > self.items.budgets[tier] - self.items.used_bytes()[tier]:
            return False  # an item that should have left is in use; the next tick plans again
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
        except (KVMemError, RuntimeError, OSError) as error:  # RuntimeError: torch's, such as out of memory
            self.failures.add(memory_id, error, self.planner.table.now)
            return False
        finally:
            self._building = None
        self.builds += 1
        self.failures.pop(memory_id, None)
        return stored
