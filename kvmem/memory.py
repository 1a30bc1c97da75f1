"""KVCacheMemory and its eleven verbs. Each method delegates to the module responsible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch

from kvmem.cache import KVCacheItem, Message, TextualMemoryItem, dynamic_cache
from kvmem.compaction import CompactionStrategy, strategy
from kvmem.config import KVCacheMemoryConfig
from kvmem.engines import Backend, Injectable
from kvmem.errors import (
    ArgumentError,
    ConfigError,
    DuplicateMemoryError,
    NamespaceError,
    PromptError,
    StorageError,
    UnknownMemoryError,
    check_kind,
)
from kvmem.prompt import with_ids_from_text
from kvmem.storage import namespace_folder

AN_ID = "An item's id is its kv_cache_id."


class KVCacheMemory:
    """Text memories as KV caches: built once, stored by id, and injected into every query.

    All its items have the namespace of its configuration. Items of other namespaces are refused.

    Verbs: extract, add, get, get_by_ids, get_all, get_cache, delete, delete_all, dump, load, from_textual_memory.
    """

    def __init__(self, config: KVCacheMemoryConfig, backend: Backend | None = None) -> None:
        """Loads the model that `config` names, unless `backend` is one that is already loaded."""
        check_kind("config", config, KVCacheMemoryConfig, way_out="Give KVCacheMemoryConfig(extractor_llm={...}).")
        check_kind("backend", backend, Backend, type(None), way_out="Leave it out to load the model that config names.")
        self.config = config
        llm = config.extractor_llm
        kwargs = config.chat_template_kwargs
        if backend is not None and kwargs and backend.template.kwargs != kwargs:
            raise ConfigError(
                "The backend was opened with other chat_template_kwargs than config names. Give them when you open it, "
                "or leave the backend out."
            )
        self.backend = backend or llm.backend_class().open(llm.config, config.template, kwargs)
        self.namespace = config.namespace
        self._items: dict[str, KVCacheItem] = {}

    @overload
    def extract(
        self,
        text: str | Sequence[Message],
        base: KVCacheItem | None = None,
        compaction: CompactionStrategy | str | None = None,
    ) -> KVCacheItem: ...
    @overload
    def extract(
        self, text: list[str], base: None = None, compaction: CompactionStrategy | str | None = None
    ) -> list[KVCacheItem]: ...
    def extract(
        self,
        text: str | Sequence[Message] | list[str],
        base: KVCacheItem | None = None,
        compaction: CompactionStrategy | str | None = None,
    ) -> KVCacheItem | list[KVCacheItem]:
        """Builds without storing: one item from a string or chat turns, a list of items from a list of strings.

        base: an item of earlier turns. `text` is then the turns that follow them, and only those are prefilled.
        compaction: a strategy or its name. The items then have fewer entries than tokens, and are marked lossy; None:
        as the configuration says. Raises CompactionError if it does not cover the model, ConfigError for an unknown
        name, PromptError for an empty text, a text longer than the model's positions (naming both lengths), and
        anything that is neither text nor turns; ArgumentError, FingerprintError or NamespaceError if `base` is not an
        item of this model and namespace.
        """
        chosen = self._chosen(compaction)
        built = self._extracted(text, base)
        if chosen is None:
            return built
        if isinstance(built, list):
            return [self.backend.compact(item, chosen) for item in built]
        return self.backend.compact(built, chosen)

    def _chosen(self, compaction: CompactionStrategy | str | None) -> CompactionStrategy | None:
        """The strategy that is given, or that of the configuration."""
        check_kind("compaction", compaction, CompactionStrategy, str, type(None), way_out="Give a strategy's name.")
        return strategy(compaction) if isinstance(compaction, str) else compaction or self.config.compaction

    def _extracted(
        self, text: str | Sequence[Message] | list[str], base: KVCacheItem | None
    ) -> KVCacheItem | list[KVCacheItem]:
        check_kind("base", base, KVCacheItem, type(None), way_out="Give the item that extract made of earlier turns.")
        if isinstance(text, str):
            if base is not None:
                raise PromptError("base extends earlier turns by chat turns. Give a list of messages, not a text.")
            return self.backend.build(text, namespace=self.namespace)
        if not isinstance(text, list | tuple):
            raise PromptError(
                f"extract takes a text, a list of texts, or a list of chat turns, and got a {type(text).__name__}."
            )
        if not text:
            raise PromptError("Nothing to extract: the list is empty. Give a text, a list of texts, or chat turns.")
        if all(isinstance(entry, str) for entry in text):
            if base is not None:
                raise PromptError("base extends earlier turns by chat turns. Give messages, not texts.")
            return [self.backend.build(entry, namespace=self.namespace) for entry in text]
        turns = tuple(_checked_turn(entry) for entry in text)
        if base is None:
            return self.backend.build(turns, namespace=self.namespace)
        self._check_namespace(base)
        self.backend.check(base)
        earlier = base.metadata.tokens.source
        if isinstance(earlier, str):
            earlier = ({"role": "system", "content": earlier},)
        return self.backend.build((*earlier, *turns), base=base, namespace=self.namespace)

    def add(self, memories: KVCacheItem | Iterable[KVCacheItem]) -> None:
        """Stores one item or several, all or none.

        Raises DuplicateMemoryError, NamespaceError or FingerprintError, naming the id, and ArgumentError for anything
        but items.
        """
        items = [memories] if isinstance(memories, KVCacheItem) else _listed(memories)
        incoming: dict[str, KVCacheItem] = {}
        for item in items:
            check_kind("What add stores", item, KVCacheItem, way_out="extract and from_textual_memory make items.")
            if item.kv_cache_id in self._items or item.kv_cache_id in incoming:
                raise DuplicateMemoryError(
                    f"The id {item.kv_cache_id} is already stored. Delete it first, or extract again."
                )
            self._check_namespace(item)
            self.backend.check(item)
            incoming[item.kv_cache_id] = item
        self._items = self._items | incoming

    def get(self, memory_id: str) -> KVCacheItem | None:
        """The stored item, or None. Raises ArgumentError if the id is not a string."""
        check_kind("The id that get takes", memory_id, str, way_out=AN_ID)
        return self._items.get(memory_id)

    def get_by_ids(self, memory_ids: Iterable[str]) -> list[KVCacheItem | None]:
        """The stored items in the order of `memory_ids`, with None for each that is missing.

        Raises ArgumentError for anything but a list of strings. For one id, use `get`.
        """
        if isinstance(memory_ids, str):
            raise ArgumentError(f"get_by_ids takes a list of ids, and got {memory_ids!r}. Use get, or give a list.")
        return [self._items.get(memory_id) for memory_id in _ids("get_by_ids", memory_ids)]

    def get_all(self) -> list[KVCacheItem]:
        """All items in the order in which they were added."""
        return list(self._items.values())

    def get_cache(self, cache_ids: str | Sequence[str]) -> Injectable:
        """A cache for one id, or for several in the given order through the configured merge strategy.

        A cache view if the engine computes in this process, a file handle if it injects files. A cache view is a new
        copy-on-write view of the stored tensors: whatever it is used for, the stored items stay bit-identical. Raises
        UnknownMemoryError for no id or an id that is not stored, and ArgumentError for anything but ids.
        """
        ids = _ids("get_cache", cache_ids)
        if not ids:
            raise UnknownMemoryError("get_cache needs one id or more, and got none.")
        missing = [memory_id for memory_id in ids if memory_id not in self._items]
        if missing:
            names = ", ".join(memory_id or "''" for memory_id in missing)
            stored = f"Stored: {len(self._items)} items, see get_all()."
            raise UnknownMemoryError(" ".join([f"Not stored: {names}. {stored}", *self._text_id_hints(missing)]))
        items = [with_ids_from_text(self._items[memory_id], self.backend.template) for memory_id in ids]
        return self.backend.view(items, self.config.merge, self.config.separator)

    def _text_id_hints(self, missing: Sequence[str]) -> list[str]:
        """A sentence for each missing id that is a text memory's. Its items have other ids, one for each build."""
        return [
            f"{source.id} is a text memory's id, and its item is {item.kv_cache_id}."
            for item in self._items.values()
            if (source := item.metadata.textual_memory) is not None and source.id in missing
        ]

    def delete(self, memory_ids: str | Iterable[str]) -> int:
        """Removes the items with these ids. Returns how many there were. Raises ArgumentError for anything but ids."""
        ids = set(_ids("delete", memory_ids))
        kept = {memory_id: item for memory_id, item in self._items.items() if memory_id not in ids}
        removed = len(self._items) - len(kept)
        self._items = kept
        return removed

    def delete_all(self) -> int:
        """Removes all items. Returns how many there were."""
        return self.delete(list(self._items))

    def dump(self, dir: str | Path) -> Path:
        """Writes all items atomically to `<dir>/<memory_filename>`. Creates the folder. Returns the path.

        With a namespace, the path is `<dir>/<namespace>/<memory_filename>`. The folder of a namespace with capital
        letters has a hash behind its name.

        Raises StorageError if it can't be written; an earlier file is then unchanged.
        """
        path = self._path(dir)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"The folder {path.parent} can't be made ({error}). Give another one.") from error
        self.backend.write(path, self.get_all())
        return path

    def load(self, dir: str | Path) -> int:
        """Replaces all items by those of the file that `dump` writes. Returns how many there are.

        What another program wrote (MemOS's pickles) states no namespace, and gets this memory's. Raises StorageError,
        FingerprintError or NamespaceError with the reason; the memory is then unchanged.
        """
        path = self._path(dir)
        items = self.backend.read(path)
        for item in items:
            if item.metadata.fingerprint is None and not item.metadata.namespace:
                item.metadata = item.metadata.model_copy(update={"namespace": self.namespace})
            self._check_namespace(item, f"{path}: ")
        if self.config.copy_files and self.backend.device.type == "cpu":  # elsewhere they are copies already
            items = [self._copied(item) for item in items]
        self._items = {item.kv_cache_id: item for item in items}
        return len(items)

    def from_textual_memory(self, mem: TextualMemoryItem) -> KVCacheItem:
        """Builds an item whose source keeps a copy of the text memory's id and metadata. Stores nothing.

        It is compacted if the configuration says so.

        Raises as `extract`, and ArgumentError if `mem` was assigned a text or metadata that a file can't keep.
        """
        check_kind("A text memory", mem, TextualMemoryItem, way_out="Give TextualMemoryItem(memory=text).")
        own = mem.checked()
        item = self.backend.build(own.memory, textual_memory=own, namespace=self.namespace)
        return item if self.config.compaction is None else self.backend.compact(item, self.config.compaction)

    def _copied(self, item: KVCacheItem) -> KVCacheItem:
        """The item with tensors of its own. Raises ChangedFileError if the file changed while it was copied."""
        copy = dynamic_cache.converted(item.kv_cache, torch.Tensor.clone, self.backend.model_config)
        dynamic_cache.check_files(item.kv_cache)
        return KVCacheItem(copy, item.metadata, item.kv_cache_id)

    def _path(self, dir: str | Path) -> Path:
        return _folder(dir) / namespace_folder(self.namespace) / self.config.memory_filename

    def _check_namespace(self, item: KVCacheItem, where: str = "") -> None:
        """Raises NamespaceError for an item of another namespace. `where` starts the message."""
        theirs = item.metadata.namespace
        if theirs != self.namespace:
            named = [
                f"the namespace {name!r}" if name else "the default namespace" for name in (theirs, self.namespace)
            ]
            raise NamespaceError(
                f"{where}Item {item.kv_cache_id} belongs to {named[0]}, and this memory is for {named[1]}. Extract the "
                "text again here, or use a memory whose config names the item's namespace."
            )


def _checked_turn(entry: object) -> Message:
    if (
        not isinstance(entry, dict)
        or set(entry) != {"role", "content"}
        or not all(isinstance(value, str) for value in entry.values())
    ):
        raise PromptError(
            f'A turn is {{"role": a text, "content": a text}}, and got {entry!r}. A list is all turns, or all texts.'
        )
    return {"role": entry["role"], "content": entry["content"]}


def _listed(given: object) -> list[Any]:
    """One object or several, as a list. A string, and whatever is not iterable, is one object."""
    return [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)


def _ids(verb: str, given: object) -> list[str]:
    """One id or several, as a list. Raises ArgumentError for anything but ids."""
    ids = _listed(given)
    for id_ in ids:
        check_kind(f"An id that {verb} takes", id_, str, way_out=AN_ID)
    return ids


def _folder(given: str | Path) -> Path:
    check_kind("A folder", given, str, PathLike, way_out="Give its path.")
    if "\0" in str(given):  # no file system accepts it, and Python raises its own error
        raise StorageError(f"The path {given!r} has a null character in it. Give another folder.")
    return Path(given)
