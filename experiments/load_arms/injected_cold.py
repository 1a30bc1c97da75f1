"""Memories are injected from files that are new to the engine's process when a load begins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

from experiments.load_arms.injected import Injected
from kvmem.cache import KVCacheItem
from kvmem.engines.vllm import VLLMBackend


class InjectedCold(Injected):
    """Like `injected`, but host memory holds none of the files: each is opened, read and verified at its first use.

    A file's time of change is set anew, so the engine takes it for another file than the one that it has read. It is
    read from the page cache, or from the disk where the scenario drops it from there.
    """

    name: ClassVar[str] = "injected_cold"
    arm: ClassVar[str] = "injected cold"
    place: ClassVar[int] = 2
    needs_files: ClassVar[bool] = False

    def prepare(self, engine: VLLMBackend, items: Sequence[KVCacheItem]) -> None:
        engine.reset()
        for item in items:
            os.utime(engine.store.file_of(item).path)

    def prepare_alone(self, engine: VLLMBackend, item: KVCacheItem) -> None:
        """The arm is judged with its file in host memory: reads vary more than a verdict on its computing allows."""
        super().prepare(engine, [item])
