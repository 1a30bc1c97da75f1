"""Finds the prefixes of real traffic that come again, and has a vLLM server keep them as memories."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmem.cache import ModelFingerprint, sha256
from kvmem.engines.vllm.connector import LearnConfig, Learner, Lesson
from kvmem.errors import StorageError
from kvmem.scheduler.backoff import RetryBackoff
from kvmem.scheduler.calibration import Calibration, Sample
from kvmem.scheduler.cost_model import Costs, LoadEstimator
from kvmem.scheduler.planner import Planner
from kvmem.scheduler.policies import policy
from kvmem.scheduler.seen_prefixes import SeenPrefix, SeenPrefixes
from kvmem.storage import replacing, write_all
from kvmem.tiers import LoadTimes

logger = logging.getLogger(__name__)

DISK = "disk"
VERSION = 1
FOLDER, STATE_NAME = "kvmem_learner", "state.json"
FIRST_PREFILLS = 3
"""After so many prefills, costs are fitted; before, a token costs what it cost in the fastest of them."""
FEWEST_ADDED = 64
"""A prefix becomes a candidate only if it is so many tokens longer than the memory that the prompt has already."""
MOST_CANDIDATES = 512
"""How many prefixes that are not stored are ranked. Those that came least recently are left out."""
STATE_EVERY = 256
"""The state is written after so many prompts, and whenever a memory is learned."""


class TrafficLearner(Learner):
    """A prefix that came `after` times is a candidate: the longest one of the prompt that did. Candidates and what was
    learned are ranked by the planner of `MemScheduler`: the seconds of prefill that the coming uses are expected to
    save, minus those of the write, per byte. Nothing is prefilled for it, because the engine has just computed it.

    A prefix of a prefix that is stored is worth nothing of its own, and a longer one only what it saves beyond. When
    the budget is full, a candidate replaces only what ranks below it.
    """

    def __init__(self, folder: Path, fingerprint: ModelFingerprint, step_tokens: int, config: LearnConfig) -> None:
        self.folder, self.after = folder, config.after
        self.seen = SeenPrefixes(step_tokens)
        self.token_bytes = fingerprint.kv_bytes(1)
        self.loads, self.writes = LoadTimes(), LoadTimes()
        self.calibration: Calibration | None = None
        self.first: list[Sample] = []
        costs = Costs(0.0, 0.0, 0.0, self.token_bytes)
        self.planner = Planner(
            policy("benefit_per_byte"),
            {DISK: int(config.budget_gib * 2**30)},
            costs,
            loads=LoadEstimator(costs, self.loads),
        )
        self.failures = RetryBackoff()
        self.files: dict[str, str] = {}
        """By id, the file of what was learned; "" while it is written."""
        self.valid_for = sha256(fingerprint.model_dump_json(exclude={"origin"}))
        self.state_path = folder / FOLDER / STATE_NAME
        self.writing = threading.Lock()
        self._restore()

    @property
    def nbytes(self) -> int:
        return sum(self._nbytes(id_) for id_ in self.files)

    def adopt(self, name: str, namespace: str, token_ids: Sequence[int]) -> None:
        id_ = self.seen.id_of(namespace, token_ids)
        if not id_ or id_ in self.files:  # of another block size, or learned twice by servers that share the store
            return
        if id_ not in self.planner.table.row_of:  # the process was killed before it wrote its state
            self._track(id_, len(token_ids), 0)
        self.files[id_] = name

    def watch(self, namespace: str, token_ids: Sequence[int], held_tokens: int, may_learn: bool) -> Lesson | None:
        path = self.seen.see(namespace, token_ids)
        again = [prefix for prefix in path if prefix.count >= self.after - 0.5]  # counts are decayed
        known = [prefix for prefix in path if prefix.id in self.planner.table.row_of]
        if again and again[-1].tokens - max([held_tokens, *(each.tokens for each in known)]) >= FEWEST_ADDED:
            for _ in range(self.after - 1):  # this time is counted below
                self._track(again[-1].id, again[-1].tokens, len(token_ids) - again[-1].tokens)
            known = sorted([*known, again[-1]], key=lambda prefix: prefix.tokens)
        for number, prefix in enumerate(known):
            self._track(prefix.id, prefix.tokens, len(token_ids) - prefix.tokens)
            self.planner.joined(prefix.id, [head.id for head in known[:number]])
        self._leave_out_old()
        if self.seen.now % STATE_EVERY == 0:
            self._write_state()
        return self._lesson(known, held_tokens) if may_learn else None

    def saved(self, lesson: Lesson, name: str, nbytes: int, write_s: float) -> None:
        self.files[lesson.id] = name
        self.writes.record(DISK, nbytes, write_s)
        self.failures.pop(lesson.id, None)
        logger.info("Learned the first %d tokens of prompts: %s", lesson.tokens, name)
        self._write_state()

    def not_saved(self, lesson: Lesson, reason: str) -> None:
        self.files.pop(lesson.id, None)
        if reason:
            self.failures.add(lesson.id, StorageError(reason), self.planner.table.now)
            logger.warning("A prefix of %d tokens was not learned: %s", lesson.tokens, reason)

    def prefilled(self, new: int, behind: int, seconds: float) -> None:
        if self.calibration is not None:
            self.calibration.prefilled(new, behind, seconds)
            self.planner.loads.costs = self.calibration.costs
            return
        self.first.append((new, behind, seconds))
        if len(self.first) >= FIRST_PREFILLS:
            self.calibration = Calibration(self.first, self.token_bytes)
            self.planner.loads.costs = self.calibration.costs
        else:
            token_s = min(seconds / new for new, _, seconds in self.first)
            self.planner.loads.costs = Costs(0.0, token_s, 0.0, self.token_bytes)

    def loaded(self, nbytes: int, seconds: float) -> None:
        self.loads.record(DISK, nbytes, seconds)

    def explain(self, namespace: str, token_ids: Sequence[int]) -> str:
        path = self.seen.look(namespace, token_ids)
        if not path:
            return f"The first {self.seen.step_tokens} tokens have not come lately."
        known = [prefix for prefix in path if prefix.id in self.planner.table.row_of]
        if not known:
            return f"The first {path[-1].tokens} tokens came {path[-1].count:.3g} times; {self.after} are needed."
        last = known[-1]
        where = "learned" if last.id in self.files else "not learned"
        why = self.planner.explain(last.id, dict.fromkeys(self.files, DISK)) + self.failures.explain(last.id)
        nbytes = self._nbytes(last.id)
        write_s, load_s = self._write_s(DISK, nbytes), self.planner.loads.load_s(DISK, nbytes)
        why += f"; a write takes about {write_s:.3f} s and a load {load_s:.3f} s"
        return f"The first {last.tokens} tokens came {last.count:.3g} times and are {where}: {why}"

    def close(self) -> None:
        self._write_state(wait=True)

    def _lesson(self, known: Sequence[SeenPrefix], held_tokens: int) -> Lesson | None:
        """The longest of these prefixes that is worth its bytes, unless the prompt has a memory about as long."""
        barred = self.failures.barred(self.planner.table.now)
        for prefix in reversed(known):
            if prefix.id in self.files:
                if not self._is_gone(prefix.id):
                    return None
                del self.files[prefix.id]
            if prefix.tokens - held_tokens < FEWEST_ADDED:
                return None
            if prefix.id in barred:
                continue
            moves = self.planner.admit(prefix.id, dict.fromkeys(self.files, DISK), write_s=self._write_s)
            if moves and any(self._is_gone(id_) for id_ in self.files):  # deleted by a client: there is more space
                self.files = {id_: name for id_, name in self.files.items() if not self._is_gone(id_)}
                moves = self.planner.admit(prefix.id, dict.fromkeys(self.files, DISK), write_s=self._write_s)
            if moves:
                evicted = tuple(self.files.pop(move.memory_id) for move in moves[:-1])
                self.files[prefix.id] = ""
                return Lesson(prefix.id, prefix.tokens, evicted)
        return None

    def _is_gone(self, id_: str) -> bool:
        name = self.files[id_]
        return bool(name) and not (self.folder / name).exists()

    def _write_s(self, tier: str, nbytes: int) -> float:
        return self.writes.expected_s(tier, nbytes) or 0.0

    def _track(self, id_: str, tokens: int, query_tokens: int) -> None:
        """Counts a use of a prefix."""
        if id_ not in self.planner.table.row_of:
            self.planner.sized(id_, tokens)
        self.planner.used(id_, query_tokens)

    def _nbytes(self, id_: str) -> int:
        return int(self.planner.table.nbytes[self.planner.table.row_of[id_]])

    def _leave_out_old(self) -> None:
        table = self.planner.table
        candidates = [id_ for id_ in table.ids if id_ not in self.files]
        if len(candidates) > MOST_CANDIDATES:
            oldest = min(candidates, key=lambda id_: table.last_use[table.row_of[id_]])
            self.planner.forget(oldest)
            self.failures.pop(oldest, None)
            for group, heads in self.planner.heads.items():
                self.planner.heads[group] = [head for head in heads if head != oldest]

    def _restore(self) -> None:
        """Takes over what an earlier process counted and measured. Without it, counting begins anew."""
        try:
            state = json.loads(self.state_path.read_bytes())
            if state["version"] != VERSION or state["valid_for"] != self.valid_for:
                return
            self.planner.restore(state["planner"])
            self.loads.restore(state["loads"])
            self.writes.restore(state["writes"])
            for new, behind, seconds in [*state["first"], *state["recent"]]:
                self.prefilled(int(new), int(behind), float(seconds))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s can't be used (%s). What comes again is counted anew.", self.state_path, error)

    def _state(self) -> dict[str, Any]:
        first, recent = self.calibration.samples() if self.calibration is not None else (self.first, [])
        return {
            "version": VERSION,
            "valid_for": self.valid_for,
            "planner": self.planner.state(),
            "loads": self.loads.state(),
            "writes": self.writes.state(),
            "first": first,
            "recent": recent,
        }

    def _write_state(self, wait: bool = False) -> None:
        """Writes the state on a thread of its own: the engine goes on."""
        thread = threading.Thread(target=self._write, args=(json.dumps(self._state()).encode(),), name="kvmem-learner")
        thread.start()
        if wait:
            thread.join()

    def _write(self, state: bytes) -> None:
        with self.writing:
            try:
                self.state_path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self.state_path) as file:
                    write_all(file, memoryview(state))
            except (OSError, StorageError) as error:
                logger.warning("What was learned of the traffic was not written: %s", error)
