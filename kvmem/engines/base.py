"""One engine, one file. A backend builds items from text, and answers queries behind a lent cache."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, PreTrainedConfig

from kvmem import discover, dynamic_cache, storage
from kvmem.backends.lent_file import LentFile
from kvmem.errors import FingerprintError
from kvmem.fingerprint import ModelFingerprint
from kvmem.items import KVCacheItem, Source, TextualMemoryItem
from kvmem.merge import MergeStrategy
from kvmem.prompt import PromptTemplate, TemplateKind


class BackendConfig:
    """The base of what configures an engine: a pydantic dataclass whose fields are its knobs."""

    backend: ClassVar[str]
    """The engine's name."""


class Backend(ABC):
    """What `KVCacheMemory` asks of an engine."""

    name: ClassVar[str]
    config_class: ClassVar[type]
    """A pydantic dataclass: the keys of `extractor_llm["config"]`."""

    template: PromptTemplate
    fingerprint: ModelFingerprint
    model_config: PreTrainedConfig
    device: torch.device
    shards: int = 1
    """Processes that share each item's heads."""

    @classmethod
    @abstractmethod
    def open(cls, config: Any, template: TemplateKind) -> Backend:
        """Loads the model that `config` names."""

    @abstractmethod
    def build(
        self, source: Source, textual_memory: TextualMemoryItem | None = None, base: KVCacheItem | None = None
    ) -> KVCacheItem:
        """Prefills `source` into a new item; behind `base`, only the tokens that it does not hold."""

    @abstractmethod
    def lend(self, items: Sequence[KVCacheItem], merge: MergeStrategy, separator: str) -> DynamicCache | LentFile:
        """What the engine injects for one item, or for several through `merge`; using it leaves them as they are."""

    def check(self, item: KVCacheItem) -> None:
        """Raises FingerprintError for another model's item: told by its fingerprint, else by its tensors' shape."""
        theirs = item.metadata.fingerprint
        if theirs is self.fingerprint:
            return
        if theirs is not None:
            difference = self.fingerprint.difference(theirs)
        else:
            difference = self.fingerprint.shape_difference(dynamic_cache.layers_of(item.kv_cache), self.shards)
        if difference:
            raise FingerprintError(
                f"Item {item.kv_cache_id} was built by another model: {difference}. Extract it again with this one."
            )

    def write(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        """One file of all items, in the format that its suffix picks; StorageError where it can't be written."""
        storage.for_filename(path.name).dump(path, items)

    def read(self, path: Path) -> list[KVCacheItem]:
        """All items of a file that this engine's model may use, else StorageError or FingerprintError."""
        return storage.for_filename(path.name).load(path, self.fingerprint, self.model_config, self.device)


def backend_class(name: str) -> type[Backend]:
    """The backend called `name`, or a ConfigError with the choices."""
    return discover.by_name(sys.modules[__name__], Backend, name, "backend")  # type: ignore[type-abstract]
