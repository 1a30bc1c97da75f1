"""What the connector counts, and under which names vLLM's /metrics shows it. Does not import vLLM."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

COUNTER, GAUGE = "counter", "gauge"
DISK_EVERY_S = 5.0
"""How often the disk's free space is looked up, at the most."""
SEPARATOR = "|"


@dataclass(frozen=True)
class Metric:
    """One metric of Prometheus."""

    kind: str
    documentation: str
    label: str = ""
    """Name of its label besides vLLM's own; "" if it has none."""
    label_values: tuple[str, ...] = ("",)
    """All values of that label."""


REQUESTS, PROMPT_TOKENS, FAILED_LOADS = "kvmem:requests", "kvmem:prompt_tokens", "kvmem:failed_loads"
SAVES, FAILED_SAVES, SAVED_TOKENS = "kvmem:saves", "kvmem:failed_saves", "kvmem:saved_tokens"
LOOKUPS, READS, READ_BYTES = "kvmem:index_lookups", "kvmem:file_reads", "kvmem:file_read_bytes"
READ_SECONDS, FAILED_READS, EVICTIONS = "kvmem:file_read_seconds", "kvmem:failed_file_reads", "kvmem:host_evictions"
BYTES, BUDGET, HOST_FILES = "kvmem:bytes", "kvmem:host_budget_bytes", "kvmem:host_files"
MEMORIES, PINS, DISK_FREE = "kvmem:memories", "kvmem:pins", "kvmem:store_free_bytes"
LEARNED, LEARNED_TOKENS, NOT_LEARNED = "kvmem:learned", "kvmem:learned_tokens", "kvmem:failed_learns"
LEARNED_EVICTIONS = "kvmem:learned_evictions"

METRICS = {
    REQUESTS: Metric(
        COUNTER,
        "Requests by where the first tokens of their prompts came from: the engine's prefix cache, a memory in host "
        "memory, a memory whose file was read, or nowhere.",
        "source",
        ("engine", "host", "file", "none"),
    ),
    PROMPT_TOKENS: Metric(
        COUNTER,
        "Prompt tokens by source: the engine's prefix cache, injected from a memory, or computed.",
        "source",
        ("engine", "memory", "computed"),
    ),
    LOOKUPS: Metric(COUNTER, "Prompts looked up in the index of memories.", "outcome", ("found", "not_found")),
    FAILED_LOADS: Metric(COUNTER, "Requests whose memory could not be injected; their tokens were computed."),
    SAVES: Metric(COUNTER, "Memories saved."),
    SAVED_TOKENS: Metric(COUNTER, "Tokens of the memories saved."),
    FAILED_SAVES: Metric(COUNTER, "Orders to save a memory that wrote no file."),
    READS: Metric(COUNTER, "Files read into host memory."),
    READ_BYTES: Metric(COUNTER, "Bytes read from files into host memory."),
    READ_SECONDS: Metric(COUNTER, "Seconds of all reads, each until its slowest rank had the file."),
    FAILED_READS: Metric(COUNTER, "Reads that failed: the file was damaged, deleted or replaced."),
    EVICTIONS: Metric(COUNTER, "Files that left host memory for others."),
    BYTES: Metric(
        GAUGE,
        "Bytes of memories: in host memory, of all files in the store, and of those files that were learned.",
        "tier",
        ("host", "store", "learned"),
    ),
    LEARNED: Metric(COUNTER, "Prefixes of the traffic that became memories by themselves."),
    LEARNED_TOKENS: Metric(COUNTER, "Tokens of those."),
    NOT_LEARNED: Metric(COUNTER, "Prefixes that were to become memories, and whose files could not be written."),
    LEARNED_EVICTIONS: Metric(COUNTER, "Learned memories that were deleted to keep the budget."),
    BUDGET: Metric(GAUGE, "Bytes of host memory that files may take."),
    HOST_FILES: Metric(GAUGE, "Files in host memory."),
    MEMORIES: Metric(GAUGE, "Files that the index can find."),
    PINS: Metric(GAUGE, "Memories pinned in the engine's prefix cache."),
    DISK_FREE: Metric(GAUGE, "Free bytes of the store's disk."),
}


class Counts:
    """Counts since the engine's start. `take_changes` gives what is new since its last call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.totals: Counter[str] = Counter()
        """By name, and for a metric with a label by `name|label`."""
        self.changed = True
        self.sent: dict[str, float] = {}
        self.free_bytes, self.free_at = 0, -DISK_EVERY_S

    def add(self, name: str, label: str = "", number: int = 1) -> None:
        self.totals[key_of(name, label)] += number
        self.changed = True

    def disk_free(self) -> int:
        """Free bytes of the store's disk, at most five seconds old; 0 if they can't be told."""
        now = time.monotonic()
        if now - self.free_at >= DISK_EVERY_S:
            self.free_at = now
            try:
                self.free_bytes = shutil.disk_usage(self.folder).free
            except OSError:
                self.free_bytes = 0
        return self.free_bytes

    def take_changes(self, states: dict[str, float]) -> dict[str, float]:
        """Counters' increases, and gauges that have changed, since the last call.

        states: values that other parts keep.
        """
        self.changed = False
        changes = {}
        for key, value in {**self.totals, **states}.items():
            before = self.sent.get(key, 0.0)
            if value != before or key not in self.sent:
                changes[key] = value - before if METRICS[name_of(key)].kind == COUNTER else value
                self.sent[key] = value
        return changes


def key_of(name: str, label: str = "") -> str:
    """Under which key a value is counted."""
    return f"{name}{SEPARATOR}{label}" if label else name


def name_of(key: str) -> str:
    """The metric's name in a key."""
    return key.partition(SEPARATOR)[0]
