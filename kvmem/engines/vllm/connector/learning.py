"""What the connector asks of a learner, which decides which prefixes of the traffic become memories by themselves.

The connector loads the learner by its name, as vLLM loads the connector: a learner may import all of kvmem, and the
connector does not import it. Importing this module does not import vLLM.
"""

from __future__ import annotations

import importlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from kvmem.cache import KVCacheMetadata, MemoryTokens, ModelFingerprint, TextualSource
from kvmem.storage import ItemHead, ItemManifest

LEARNED = "learned"
"""Key in the metadata of a file that was learned: True."""
SHORTEST_STEP = 32
"""Prefixes are counted at multiples of this, or of the engine's block if that is larger."""
TRAFFIC_LEARNER = "kvmem.scheduler.traffic_learner:TrafficLearner"


@checked_dataclass(config=ConfigDict(extra="forbid"))
class LearnConfig:
    """How the connector learns."""

    budget_gib: float = Field(default=16.0, gt=0)
    """Disk space for what was learned, in GiB. Memories that were created by name do not count."""
    after: int = Field(default=3, ge=2)
    """How often a prefix has to come before it may become a memory."""
    learner: str = TRAFFIC_LEARNER
    """`module:class` of a Learner."""


@dataclass(frozen=True)
class Lesson:
    """A prefix to save: the first `tokens` tokens of the prompt that was watched."""

    id: str
    tokens: int
    evicted: tuple[str, ...] = ()
    """Files to delete first, so that the budget holds."""


class Learner(ABC):
    """Watches prompts, one after the other. It holds no keys and values, and is called by the engine's thread only."""

    @abstractmethod
    def __init__(self, folder: Path, fingerprint: ModelFingerprint, step_tokens: int, config: LearnConfig) -> None:
        """folder: the store. step_tokens: lengths of lessons are multiples of it."""

    @abstractmethod
    def adopt(self, name: str, namespace: str, token_ids: Sequence[int]) -> None:
        """A file that an earlier process learned is in the store."""

    @abstractmethod
    def watch(self, namespace: str, token_ids: Sequence[int], held_tokens: int, may_learn: bool) -> Lesson | None:
        """Counts a prompt. Returns what of it becomes a memory, if anything.

        held_tokens: how many of its first tokens a memory of the store covers. may_learn: False while another lesson
        is being saved.
        """

    @abstractmethod
    def saved(self, lesson: Lesson, name: str, nbytes: int, write_s: float) -> None:
        """The lesson is in the file `name`, which took `write_s` seconds to write."""

    @abstractmethod
    def not_saved(self, lesson: Lesson, reason: str) -> None:
        """The lesson was not saved. reason: "" if its request ended early."""

    @abstractmethod
    def prefilled(self, new: int, behind: int, seconds: float) -> None:
        """The engine computed `new` tokens behind `behind` cached ones."""

    @abstractmethod
    def loaded(self, nbytes: int, seconds: float) -> None:
        """A file of `nbytes` was read into host memory."""

    @abstractmethod
    def explain(self, namespace: str, token_ids: Sequence[int]) -> str:
        """What is known of a prompt's prefixes, in a sentence."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of what was learned and is stored."""

    @abstractmethod
    def close(self) -> None:
        """Writes what the next process needs."""


def learner_of(settings: Mapping[str, Any], folder: Path, fingerprint: ModelFingerprint, block_tokens: int) -> Learner:
    """The learner that the connector's settings name."""
    config = LearnConfig(**settings)
    module, _, name = config.learner.partition(":")
    kind: type[Learner] = getattr(importlib.import_module(module), name)
    return kind(folder, fingerprint, max(block_tokens, -(-SHORTEST_STEP // block_tokens) * block_tokens), config)


def learned_manifest(token_ids: Sequence[int], fingerprint: ModelFingerprint, namespace: str) -> ItemManifest:
    """The manifest of a learned memory. Its source is unknown: traffic is tokens."""
    ids = tuple(token_ids)
    tokens = MemoryTokens(source="", template="plain", token_ids=ids, header_tokens=0, body_end=len(ids))
    metadata = KVCacheMetadata(
        tokens=tokens,
        build_s=0.0,
        kv_bytes=fingerprint.kv_bytes(len(ids)),
        fingerprint=fingerprint,
        textual_memory=TextualSource(id="", metadata={LEARNED: True}),
        namespace=namespace,
    )
    return ItemManifest(
        kv_cache_id=str(uuid.uuid4()), cache_tokens=len(ids), layers=fingerprint.layers, metadata=metadata
    )


def is_learned(head: ItemHead) -> bool:
    """Whether a file was learned."""
    source = head.entry.metadata.textual_memory
    return source is not None and source.metadata.get(LEARNED) is True
