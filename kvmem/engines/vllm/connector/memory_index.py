"""Finds the stored memory that a prompt begins with; used in the scheduler. Does not import vLLM.

The index holds a hash of each memory's first 32 tokens, first 64, and so on. A prompt is hashed in the same steps, up
to the first hash that no memory has. A lookup costs microseconds, however many memories there are and however long they
are. What it finds is compared token by token.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from kvmem.cache import ModelFingerprint
from kvmem.engines.vllm.connector.learning import is_learned
from kvmem.engines.vllm.connector.protocol import MEMORY_NAME, digest
from kvmem.errors import StorageError
from kvmem.storage import ItemHead, read_head

STEP_TOKENS = 32
"""Memories that share fewer tokens with a prompt are not found."""
MOST_HEADS = 8
"""How many new files are read between two steps of the engine, at a few ms each. The next look takes the rest."""
SETTLED_NS = 100_000_000
"""A folder that changed this recently may change again without another time of change."""
MOST_CANDIDATES = 32
"""How many memories are compared token by token, of those that share the most hashes with the prompt."""

RETRY_NS = 60_000_000_000
"""When a file that could not be injected is tried again: a disk may have failed for a moment."""

Ids = npt.NDArray[np.int32]
NO_IDS: Ids = np.empty(0, np.int32)


@dataclass(frozen=True)
class Match:
    """What the index says about a prompt."""

    name: str = ""
    """The file of the longest memory; "" if there is none."""
    tokens: int = 0
    """How many first tokens it shares with the prompt, without the prompt's last one, whose logits are needed."""
    reason: str = ""
    """Why there is none; "" if there is one."""


@dataclass
class Node:
    """Memories that begin with the same tokens, by name of their files."""

    through: dict[str, None] = field(default_factory=dict)
    """All of them."""
    ending: dict[str, None] = field(default_factory=dict)
    """Those that have no further whole step."""


@dataclass(frozen=True)
class Indexed:
    """A file in the index."""

    inode: int
    token_ids: Ids
    """Empty for a file that the index leaves out, for `reason`."""
    kv_bytes: int = 0
    reason: str = ""
    learned_in: str | None = None
    """The namespace of a file that was learned from the traffic; None for other files."""


class MemoryIndex:
    """The memories of one folder, by namespace and first tokens. It follows the folder: `refresh` looks at the folder's
    time of change, and at its list of files only if that is new."""

    def __init__(self, folder: Path, fingerprint: ModelFingerprint, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.clock_ns = clock_ns
        self.files: dict[str, Indexed] = {}
        self.nodes: dict[str, dict[bytes, Node]] = defaultdict(dict)
        """By the namespace's digest, which is part of a file's name, and by hash."""
        self.pending: dict[str, int] = {}
        """Files that are still to be read, with their inodes."""
        self.failed: dict[str, int] = {}
        """Files that are left out for a while, and when they are tried again, in ns of the clock."""
        self.seen_ns = -1
        """The folder's time of change when its files were last listed; -1 if they are to be listed again."""
        self.scans = 0
        """How often the files were listed."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of all readable files."""
        return sum(indexed.kv_bytes for indexed in self.files.values())

    @property
    def memories(self) -> int:
        """How many files can be found."""
        return sum(not indexed.reason for indexed in self.files.values())

    def refresh(self, most_heads: int | None = MOST_HEADS) -> None:
        """Takes notice of files that were added, replaced or deleted. most_heads: None reads all new ones now."""
        try:
            changed_ns = os.stat(self.folder).st_mtime_ns
        except OSError:  # for the moment; what is found there is opened before it is used
            return
        if changed_ns != self.seen_ns:
            with suppress(OSError):
                self._scan()
                self.seen_ns = changed_ns if self.clock_ns() - changed_ns > SETTLED_NS else -1
        for name in [name for name, at in self.failed.items() if at <= self.clock_ns()]:
            self.pending[name] = self.files[name].inode
            self._remove(name)
        for name in list(islice(self.pending, most_heads)):
            self._add(name, self.pending.pop(name))

    def find(self, namespace: str, token_ids: Sequence[int]) -> Match:
        """The memory of this namespace that shares the most tokens with a prompt, if they are at least half of its own:
        its whole file would be read for them."""
        nodes = self.nodes.get(digest(namespace))
        if not nodes:
            return Match(reason="The namespace has no memory.")
        ids = np.asarray(token_ids, np.int32)
        path = []
        for key in _hashes(ids):
            node = nodes.get(key)
            if node is None:
                break
            path.append(node)
        if not path:
            return Match(reason=f"No memory begins with the prompt's first {STEP_TOKENS} tokens.")
        candidates = dict.fromkeys(islice(path[-1].through, MOST_CANDIDATES))
        for node in reversed(path):
            candidates |= dict.fromkeys(islice(node.ending, 1))
        best, best_tokens, longest = "", 0, 0
        for name in candidates:
            memory_ids = self.files[name].token_ids
            tokens = _shared(memory_ids, ids[:-1])
            longest = max(longest, tokens)
            if 2 * tokens < len(memory_ids):
                continue
            if (tokens, -len(memory_ids)) > (best_tokens, -len(self.files[best].token_ids) if best else 0):
                best, best_tokens = name, tokens
        if not best:
            return Match(
                reason=f"Memories share {longest} tokens with the prompt at the most, less than half of theirs."
            )
        return Match(best, best_tokens)

    def learned(self) -> list[tuple[str, str, Ids]]:
        """Name, namespace and token ids of each file that was learned from the traffic and can be found."""
        return [
            (name, indexed.learned_in, indexed.token_ids)
            for name, indexed in self.files.items()
            if indexed.learned_in is not None and not indexed.reason
        ]

    def accepts(self, head: ItemHead) -> str:
        """Why a file can't be injected where no request names it; "" if it can."""
        built_by = head.entry.metadata.fingerprint
        if built_by is None or not head.is_plain:
            return "Its keys and values are not those of a prefill: merged, lossy or of unknown origin."
        return self.fingerprint.difference(built_by) or ""

    def leave_out(self, name: str, reason: str) -> None:
        """A file that could not be injected is not found again for a minute, unless it is replaced."""
        indexed = self.files.get(name)
        if indexed is not None:
            self._remove(name)
            self.files[name] = Indexed(indexed.inode, NO_IDS, indexed.kv_bytes, reason)
            self.failed[name] = self.clock_ns() + RETRY_NS

    def _scan(self) -> None:
        self.scans += 1
        with os.scandir(self.folder) as entries:
            present = {entry.name: entry.inode() for entry in entries if MEMORY_NAME.fullmatch(entry.name)}
        for name in [name for name, indexed in self.files.items() if present.get(name) != indexed.inode]:
            self._remove(name)
        self.pending = {name: inode for name, inode in present.items() if name not in self.files}

    def _add(self, name: str, inode: int) -> None:
        try:
            head = read_head(self.folder / name)
            reason = self.accepts(head)
        except StorageError as error:
            self.files[name] = Indexed(inode, NO_IDS, 0, str(error))
            return
        if not reason and len(head.token_ids) < STEP_TOKENS:
            reason = f"It has fewer than {STEP_TOKENS} tokens."
        ids = np.asarray(() if reason else head.token_ids, np.int32)
        learned_in = head.entry.metadata.namespace if is_learned(head) else None
        self.files[name] = Indexed(inode, ids, head.kv_bytes, reason, learned_in)
        node = None
        for key in _hashes(ids):
            node = self._nodes_of(name).setdefault(key, Node())
            node.through[name] = None
        if node is not None:
            node.ending[name] = None

    def _remove(self, name: str) -> None:
        nodes = self._nodes_of(name)
        self.failed.pop(name, None)
        for key in _hashes(self.files.pop(name).token_ids):
            node = nodes[key]
            del node.through[name]
            node.ending.pop(name, None)
            if not node.through:
                del nodes[key]

    def _nodes_of(self, name: str) -> dict[bytes, Node]:
        return self.nodes[name.partition("-")[0]]


def _hashes(ids: Ids) -> Iterator[bytes]:
    """The hashes of the first 32 tokens, of the first 64, and so on."""
    data, step = memoryview(ids.tobytes()), STEP_TOKENS * ids.itemsize
    state = xxhash.xxh3_128()
    for at in range(0, len(data) - step + 1, step):
        state.update(data[at : at + step])
        yield state.digest()


def _shared(a: Ids, b: Ids) -> int:
    """The length of the longest common prefix."""
    most = min(len(a), len(b))
    different = np.flatnonzero(a[:most] != b[:most])
    return int(different[0]) if len(different) else most
