"""The interface of an engine, which builds items from text and answers queries with them."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from transformers import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kvmem import storage
from kvmem.cache import (
    CacheView,
    KVCacheItem,
    MemoryTokens,
    ModelFingerprint,
    Source,
    TextualMemoryItem,
    dynamic_cache,
)
from kvmem.compaction import CompactionStrategy
from kvmem.errors import CompactionError, ConfigError, FingerprintError, StoredCacheError, check_kind
from kvmem.merge import MergeStrategy
from kvmem.models import max_positions
from kvmem.prompt import PromptTemplate, Query, TemplateKind, TokenizedPrompt
from kvmem.registry import Registry

BetweenLayers = Callable[[], None]
"""Called between two layers of a build; it may block, or raise BuildCancelled."""


COMPACTED_BY = "Use backend=huggingface, or extract without compaction."


class StoredFile:
    """A file that is deleted with the last reference to this object. What is mapped from it stays readable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class FileHandle:
    """What `get_cache` returns if the engine holds the KV: the tokens, and the file from which they are injected.

    file: None for an exact merge. The engine prefills it as a prefix of the prompt and then finds it in its own cache.
    salt: if not None, it separates the engine's blocks from blocks of the same ids, because this KV is not what a
    prefill of the ids gives (an inexact merge, or a cache of unknown origin).
    """

    tokens: MemoryTokens
    file: StoredFile | None
    salt: str | None = None
    namespace: str = ""
    """The namespace of the memories: the engine's blocks are shared within one namespace only."""


Injectable = CacheView | FileHandle
"""What `get_cache` returns: a cache view if the engine computes in this process, a file handle if it injects files."""


class BackendConfig:
    """Base of an engine's configuration: a pydantic dataclass whose fields are its settings."""

    backend: ClassVar[str]
    """The engine's name."""


@runtime_checkable
class TensorParallelConfig(Protocol):
    """The configuration of an engine that can divide a model among several devices."""

    tensor_parallel_size: int


class Backend(ABC):
    """What `KVCacheMemory` needs from an engine."""

    name: ClassVar[str]
    config_class: ClassVar[type]
    """A pydantic dataclass: the keys of `extractor_llm["config"]`."""

    template: PromptTemplate
    fingerprint: ModelFingerprint
    model_config: PreTrainedConfig
    device: torch.device
    shards: int = 1
    """Processes among which the heads of each item are split."""
    takes_compacted: ClassVar[bool] = False
    """Whether the engine compacts memories, and answers with compacted ones."""

    @classmethod
    @abstractmethod
    def open(
        cls, config: Any, template: TemplateKind, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> Backend:
        """Loads the model that `config` names. chat_template_kwargs: the chat template's own arguments."""

    @abstractmethod
    def build(
        self,
        source: Source,
        textual_memory: TextualMemoryItem | None = None,
        base: KVCacheItem | None = None,
        between_layers: BetweenLayers | None = None,
        namespace: str = "",
    ) -> KVCacheItem:
        """Prefills `source` into a new item. With `base`, computes only the tokens that `base` does not hold.

        namespace: the item's. An engine with a prefix cache of its own shares its blocks within one namespace only.

        between_layers: called in this thread before each layer is computed, after the device has finished the layer
        before it. It may block, so that requests of other threads go first, and it may raise BuildCancelled, which ends
        the build. An engine with a scheduler of its own, which interleaves the build with requests, calls it once,
        before it submits the build. Raises ConfigError if the engine can do neither.
        """

    def compact(self, item: KVCacheItem, strategy: CompactionStrategy) -> KVCacheItem:
        """A new item with fewer entries than tokens. The given item is left as it is.

        Raises CompactionError if the engine, or the strategy, does not cover this item or this model.
        """
        raise CompactionError(f"backend={self.name} does not compact memories. {COMPACTED_BY}")

    @property
    def build_writes_file(self) -> bool:
        """Whether `build` ends once the item is in a file, so that its seconds include the file's."""
        return False

    def measure_prefill(self, lengths: Sequence[int]) -> list[float]:
        """Seconds of a prefill of each number of tokens with nothing cached: warmed up, the median of several.

        Raises ConfigError if the engine has no such measurement.
        """
        raise ConfigError(f"backend={self.name} does not measure prefills. Use backend=huggingface or hf_graph.")

    @property
    def max_tokens(self) -> int:
        """The longest sequence that the engine computes: memory, query and answer together.

        `kvmem.models.NO_MAXIMUM` if the model sets no limit, as with ALiBi.
        """
        return max_positions(self.model_config)

    def check_builds_in_one_step(self, between_layers: BetweenLayers | None) -> None:
        """Raises ConfigError if `between_layers` is given, for engines that compute a build in one step."""
        if between_layers is not None:
            raise ConfigError(
                f"backend={self.name} computes all layers of a build in one step and can't pause between them. "
                "Use backend=huggingface or hf_graph, or leave between_layers out."
            )

    @abstractmethod
    def view(self, items: Sequence[KVCacheItem], merge: MergeStrategy, separator: str) -> Injectable:
        """What the engine injects for one item, or for several through `merge`. Its use does not change the items."""

    def check(self, item: KVCacheItem) -> None:
        """Raises FingerprintError for an item of another model, StoredCacheError for one that was changed, and
        CompactionError for a compacted one if the engine does not take it.

        Compares fingerprints or, if the item has none, the shapes of its tensors.
        """
        check_whole(item)
        self._check_compaction(item)
        built_by = item.metadata.fingerprint
        if built_by is self.fingerprint:
            return
        if built_by is not None:
            difference = self.fingerprint.difference(built_by)
        else:
            difference = self.fingerprint.shape_difference(dynamic_cache.contents_of(item.kv_cache), self.shards)
        if difference:
            raise FingerprintError(
                f"Item {item.kv_cache_id} was built by another model: {difference}. Extract it again with this one."
            )

    def write(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        """Writes all items to one file, in the format of its suffix.

        Raises StorageError if it can't be written, and StoredCacheError for an item that was changed.
        """
        for item in items:
            check_whole(item)
        storage.for_filename(path.name).dump(path, items)

    def read(self, path: Path) -> list[KVCacheItem]:
        """Reads all items of a file. Raises StorageError, FingerprintError for items of another model, or
        CompactionError for compacted ones if the engine does not take them."""
        items = storage.for_filename(path.name).load(path, self.fingerprint, self.model_config, self.device)
        for item in items:
            self._check_compaction(item)
        return items

    def _check_compaction(self, item: KVCacheItem) -> None:
        if item.metadata.compaction is not None and not self.takes_compacted:
            raise CompactionError(
                f"Item {item.kv_cache_id} is {item.metadata.lossy}, and backend={self.name} does not take compacted "
                f"memories. {COMPACTED_BY}"
            )


def check_whole(item: KVCacheItem) -> None:
    """Raises StoredCacheError if the stored cache does not hold the item's tokens any more.

    A model that is given `item.kv_cache` itself grows it. An item without tensors here (a prefix on a server), or whose
    token ids are not known yet, passes.
    """
    held, tokens = item.kv_cache.get_seq_length(), item.metadata.token_count
    if held and tokens and held != tokens:
        raise StoredCacheError(
            f"The cache of item {item.kv_cache_id} holds {held} tokens, and its memory has {tokens}: a model or a crop "
            "changed it. Give models the view of get_cache, never item.kv_cache. Extract the memory again, or load it "
            "from its file."
        )


ENGINES = Registry(Backend, "kvmem.engines", "backend")


def backend_class(name: str) -> type[Backend]:
    """The backend called `name`. Raises ConfigError with the choices for an unknown name."""
    return ENGINES.find(name)


def check_view(cache: CacheView, fingerprint: ModelFingerprint, shards: int = 1) -> None:
    """Raises ArgumentError for anything but a cache view, and FingerprintError for one of another model.

    Compares fingerprints or, if the cache has none, the shapes of its tensors, whose heads are split among `shards`
    processes.
    """
    check_kind("A cache", cache, CacheView, way_out="KVCacheMemory.get_cache returns one for ids.")
    built_by = cache.fingerprint
    if built_by is fingerprint:
        return
    if built_by is not None:
        difference = fingerprint.difference(built_by)
    elif cache.get_seq_length():
        difference = fingerprint.shape_difference(dynamic_cache.contents_of(cache), shards)
    else:  # it holds nothing, so the whole prompt is computed
        return
    if difference:
        raise FingerprintError(
            f"This cache comes from another model: {difference}. Answer with that model's backend, or extract the "
            "memory again with this one."
        )


@dataclass(frozen=True)
class FirstToken:
    """One greedy token, and the engine's own count of prompt tokens that it did not compute for it.

    `local_tokens` of them came from the engine's prefix cache, the others from the memory. `logits_V`, (vocab,), are
    the logits that gave the token, on the engine's device, until its next call; None if the engine does not give them.
    """

    id: int
    cached_tokens: int
    local_tokens: int = 0
    logits_V: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class GreedyAnswer:
    """Greedy tokens, also beyond an end token, and the logits that gave each, (steps, vocab).

    If the engine reports only its largest log-probabilities, `complete` is False and the others are -inf. Differences
    between two tokens are then those of the logits, but bitwise equality can't be checked.
    """

    token_ids: tuple[int, ...]
    logits_SV: torch.Tensor
    complete: bool = True


class MeasuredBackend(Backend):
    """An engine that experiments can measure."""

    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    compute_device: torch.device
    """Where it computes; `device` is where items are."""
    ranks: int = 1
    """GPUs that share the work."""
    prefix_block_tokens: int | None = None
    """Tokens of a block of the engine's own prefix cache; None: it has none."""
    attention: str
    """The attention kernel's name."""

    @abstractmethod
    def split(self, query: Query, kv_cache: Any = None) -> TokenizedPrompt:
        """The prompt of `query`, split after what `kv_cache` holds of it. Raises PromptError if it is too long."""

    @abstractmethod
    def first_token(self, prompt: TokenizedPrompt, kv_cache: Any = None) -> FirstToken:
        """The first greedy token, on the host. With a cache, only the tokens that it does not hold are computed."""

    @abstractmethod
    def greedy(self, prompt: TokenizedPrompt, kv_cache: Any, steps: int) -> GreedyAnswer:
        """`steps` greedy tokens, with the logits that gave each."""

    def held_tokens(self, prompt: TokenizedPrompt, kv_cache: Any) -> int:
        """How many prompt tokens a hit with `kv_cache` spares: exactly this many, or it was not a hit."""
        return len(prompt.memory_ids)

    def reset(self) -> None:
        """Empties what the engine caches of earlier prompts by itself. By default it caches nothing."""
