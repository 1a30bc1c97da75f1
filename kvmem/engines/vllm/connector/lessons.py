"""Saves the prefixes that a learner chooses from the traffic; used in the scheduler.

A request computes or reuses a prefix anyway. Its blocks are kept until the workers have copied them, and are written
behind the engine's back: nothing is computed twice, and no request waits for a file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmem.cache import ModelFingerprint
from kvmem.engines.vllm.connector import counts
from kvmem.engines.vllm.connector.background_saves import SaveDone
from kvmem.engines.vllm.connector.block_pins import BlockPins
from kvmem.engines.vllm.connector.counts import Counts
from kvmem.engines.vllm.connector.file_reads import ReadDone
from kvmem.engines.vllm.connector.learning import Learner, Lesson, learned_manifest
from kvmem.engines.vllm.connector.protocol import NO_LEASE, digest, memory_name, namespace_of, part_name
from kvmem.engines.vllm.connector.rank_parts import join_parts
from kvmem.engines.vllm.connector.transfers import Transfer
from kvmem.errors import FingerprintError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FEWEST_MEASURED = 16
MOST_BESIDE = 8
"""A step tells what a prefill costs if one request computes so many tokens, and all others together at most so many."""


@dataclass
class Pending:
    """A lesson whose request is still to fill its blocks."""

    lesson: Lesson
    namespace: str
    item: str
    """The manifest, as JSON."""
    block_ids: list[int] = field(default_factory=list)


@dataclass
class Saving:
    """A lesson whose blocks are full: it no longer depends on its request."""

    lesson: Lesson
    name: str
    copied: int = 0
    """How many ranks have copied their heads to host memory."""
    done: list[SaveDone] = field(default_factory=list)
    """One for each rank that has ended its save."""


class Lessons:
    """Has one prefix saved at a time. One for each engine that learns."""

    def __init__(
        self,
        folder: Path,
        fingerprint: ModelFingerprint,
        config: PreTrainedConfig,
        learner: Learner,
        ranks: int,
        block_size: int,
        pins: BlockPins,
        metrics: Counts,
    ) -> None:
        self.folder, self.fingerprint, self.config, self.learner = folder, fingerprint, config, learner
        self.ranks, self.block_size, self.pins, self.counts = ranks, block_size, pins, metrics
        self.pending: dict[str, Pending] = {}
        """By request."""
        self.saving: Saving | None = None
        self.joined: list[tuple[Saving, str]] = []
        """Files whose ranks' parts were joined by a thread, each with an error if that failed."""
        self.distrusted: set[str] = set()
        """Digests of salts whose blocks in the engine's prefix cache may not be those of a prefill."""
        self.step: tuple[float, int, int] | None = None
        """When this step began, and how many tokens it computes behind how many, if that tells a prefill's cost."""

    def adopt(self, files: Iterable[tuple[str, str, Any]]) -> None:
        """Files in the store that were learned before: name, namespace and token ids."""
        for name, namespace, token_ids in files:
            self.learner.adopt(name, namespace, token_ids)

    def distrust(self, salt: str | None) -> None:
        """A request of this salt injects keys and values that are not those of a prefill. Requests of the same salt
        may find them in the engine's prefix cache, so nothing is learned from those."""
        self.distrusted.add(digest(salt or ""))

    def watch(self, request_id: str, salt: str | None, token_ids: Sequence[int], held_tokens: int) -> None:
        """A request comes, of whose prompt the store has the first `held_tokens` tokens."""
        if digest(salt or "") in self.distrusted:
            return
        namespace = namespace_of(salt)
        is_free = self.saving is None and not self.pending
        lesson = self.learner.watch(namespace, token_ids, held_tokens, is_free)
        if lesson is None:
            return
        for name in lesson.evicted:
            self.counts.add(counts.LEARNED_EVICTIONS)
            with suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)
        manifest = learned_manifest(token_ids[: lesson.tokens], self.fingerprint, namespace)
        self.pending[request_id] = Pending(lesson, namespace, manifest.model_dump_json())

    def allocated(self, request_id: str, block_ids: Sequence[int]) -> None:
        """All blocks that a request has."""
        if request_id in self.pending:
            self.pending[request_id].block_ids = list(block_ids)

    def more_blocks(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Blocks that a running request is given for its next tokens."""
        if request_id in self.pending:
            self.pending[request_id].block_ids += block_ids

    def plan(self, computed: Mapping[str, int], scheduled: Mapping[str, int], has_loads: bool) -> list[Transfer]:
        """The saves whose blocks are full after this step. computed: by request, tokens before it."""
        self._watch_step(computed, scheduled, has_loads)
        saves = []
        for request_id in [each for each in self.pending if each in computed]:
            pending = self.pending[request_id]
            tokens = pending.lesson.tokens
            if computed[request_id] + scheduled[request_id] < tokens:
                continue
            del self.pending[request_id]
            block_ids = tuple(pending.block_ids[: tokens // self.block_size])
            name = memory_name(pending.namespace, NO_LEASE)
            self.pins.hold(name, block_ids)
            self.saving = Saving(pending.lesson, name)
            saves.append(Transfer(request_id, name, block_ids, 0, tokens, pending.item))
        return saves

    def record(self, reads: Iterable[ReadDone], saves: Iterable[SaveDone]) -> None:
        """What the workers report."""
        for read in reads:
            if not read.error:
                self.learner.loaded(read.key[2], read.seconds)  # the file's size
        for done in saves:
            saving = self.saving
            assert saving is not None and saving.name == done.name
            if not done.is_written:
                saving.copied += 1
                if saving.copied == self.ranks:
                    self.pins.let_go(done.name)
                continue
            saving.done.append(done)
            if len(saving.done) == self.ranks:
                self._close(saving)

    def finished(self, request_id: str) -> None:
        """A request ended. What it had not filled is not learned."""
        pending = self.pending.pop(request_id, None)
        if pending is not None:
            self.learner.not_saved(pending.lesson, "")

    def step_ended(self) -> None:
        """The tokens of a step are there."""
        if self.step is not None:
            began, new, behind = self.step
            self.step = None
            self.learner.prefilled(new, behind, time.perf_counter() - began)
        while self.joined:
            self._end(*self.joined.pop())

    def _watch_step(self, computed: Mapping[str, int], scheduled: Mapping[str, int], has_loads: bool) -> None:
        largest = max(scheduled, key=lambda request_id: scheduled[request_id], default="")
        self.step = None
        if not has_loads and largest and scheduled[largest] >= FEWEST_MEASURED:
            new = scheduled[largest]
            if sum(scheduled.values()) - new <= MOST_BESIDE:
                self.step = time.perf_counter(), new, computed[largest]

    def _close(self, saving: Saving) -> None:
        """Every rank has ended its save."""
        error = next((done.error for done in saving.done if done.error), "")
        if self.ranks == 1 or error:
            self._end(saving, error)
            return

        def join() -> None:
            failed = "The ranks' parts could not be joined."
            try:
                join_parts(self.folder, saving.name, self.fingerprint, self.config, self.ranks)
                failed = ""
            except (StorageError, FingerprintError) as failure:
                failed = str(failure)
            finally:
                self.joined.append((saving, failed))

        threading.Thread(target=join, name="kvmem-join", daemon=True).start()

    def _end(self, saving: Saving, error: str) -> None:
        self.saving = None
        lesson = saving.lesson
        if error:
            self.counts.add(counts.NOT_LEARNED)
            self.learner.not_saved(lesson, error)
            for name in {saving.name, *(part_name(saving.name, rank, self.ranks) for rank in range(self.ranks))}:
                with suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)
            return
        self.counts.add(counts.LEARNED)
        self.counts.add(counts.LEARNED_TOKENS, number=lesson.tokens)
        self.learner.saved(
            lesson, saving.name, self.fingerprint.kv_bytes(lesson.tokens), max(done.seconds for done in saving.done)
        )
