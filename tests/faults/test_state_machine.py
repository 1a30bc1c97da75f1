"""All verbs of KVCacheMemory in random order against a plain dictionary, with dumps, loads and crashes in between.

The dictionary says what is stored, what each file holds, and which call must fail with which error. After every step
all stored items, all files' folders and all objects of the caller are compared with it.

Longer: set the environment variables KVMEM_STATE_EXAMPLES and KVMEM_STATE_STEPS, for example to 400 and 50.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmem import KVCacheItem, KVCacheMemory, TextualMemoryItem
from kvmem.cache.dynamic_cache import KV, layers_of
from kvmem.errors import (
    ArgumentError,
    DuplicateMemoryError,
    FingerprintError,
    KVMemError,
    NamespaceError,
    PromptError,
    StorageError,
    UnknownMemoryError,
)
from tests.helpers.stored import same_tensors
from tests.helpers.tiny import copy_of, memory_on, same_bits, tiny_backend

EXAMPLES = int(os.environ.get("KVMEM_STATE_EXAMPLES", "15"))
STEPS = int(os.environ.get("KVMEM_STATE_STEPS", "20"))

TEXTS = ("The first rule is short.", "El río pasa por aquí.", "北京是中国的首都。", "A list:\n\n- one\n- two", "x")
TURNS = (
    {"role": "user", "content": "My dog is called Bodo."},
    {"role": "assistant", "content": "A good name."},
    {"role": "user", "content": "And 3 < 4 & 5?"},
)
TURN_AND_TEXT = ["a", {"role": "user", "content": "b"}]
NO_TEXTS: tuple[Any, ...] = ("", [], 3, None, "\ud800", b"x", TURN_AND_TEXT, [{"role": "user"}])
NO_IDS = ("nobody", "", "../up", "\ud800", "text-0")
METADATA: tuple[dict[str, Any], ...] = ({}, {"source": "mail", "tags": ["a", ["b"]]}, {"ü": {"deep": [1, 2.5, None]}})
SPOILS: tuple[Any, ...] = (object(), {1, 2}, float("nan"), (1, 2), b"x", {3: "x"}, "\ud800")
FOLDERS = ("one", "two")
MOST_TOKENS = 150
FRACTIONS = st.floats(0, 1, exclude_max=True)
NUMBERS = st.integers(0, 99)

Recipe = tuple[Any, ...]
"""How an item was made: ("text", text), or ("turns", indices of TURNS, the recipe of the base or None)."""


@dataclass
class Made:
    """An item in the caller's hands, with what it was when it was made."""

    item: KVCacheItem
    recipe: Recipe
    metadata: str
    tensors: list[KV]


@dataclass(frozen=True)
class Record:
    """What the dictionary knows of a stored item."""

    recipe: Recipe
    metadata: str


class Reference:
    """Each recipe built once, by another memory."""

    def __init__(self) -> None:
        self.items: dict[Recipe, KVCacheItem] = {}
        self.merged: dict[tuple[Recipe, ...], list[KV]] = {}

    def item(self, recipe: Recipe) -> KVCacheItem:
        if recipe not in self.items:
            self.items[recipe] = made_by(memory_on(tiny_backend("qwen3")), recipe, self.item)
        return self.items[recipe]

    def layers(self, recipes: tuple[Recipe, ...]) -> list[KV]:
        """What get_cache gives for these in this order."""
        if recipes not in self.merged:
            memory = memory_on(tiny_backend("qwen3"))
            items = [KVCacheItem(self.item(recipe).kv_cache, self.item(recipe).metadata) for recipe in recipes]
            memory.add(items)
            self.merged[recipes] = layers_of(memory.get_cache([item.kv_cache_id for item in items]))
        return self.merged[recipes]


def made_by(memory: KVCacheMemory, recipe: Recipe, item_of: Callable[[Recipe], KVCacheItem]) -> KVCacheItem:
    if recipe[0] == "text":
        return memory.extract(recipe[1])
    _, turns, base = recipe
    return memory.extract([TURNS[i] for i in turns], base=None if base is None else item_of(base))


REFERENCE = Reference()


def other_models_item() -> KVCacheItem:
    return memory_on(tiny_backend("llama")).extract(TEXTS[0])


def all_bits(layers: list[KV]) -> list[tuple[bytes, ...]]:
    return [tuple(tensor.contiguous().numpy().tobytes() for tensor in pair) for pair in layers]


def stated(item: KVCacheItem) -> str:
    return item.metadata.model_dump_json()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: a write that would is short, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Verbs(RuleBasedStateMachine):
    @initialize(suffix=st.sampled_from(["safetensors", "pickle"]), namespace=st.sampled_from(["", "ours"]))
    def begin(self, suffix: str, namespace: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kvmem-state-"))
        self.fields = {"memory_filename": f"memory.{suffix}", "namespace": namespace}
        self.memory = memory_on(tiny_backend("qwen3"), **self.fields)
        self.stored: dict[str, Record] = {}
        self.files: dict[str, dict[str, Record]] = {}
        self.made: list[Made] = []

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    # What the dictionary says about a call

    def call(self, error: type[KVMemError] | None, call: Callable[[], Any], *arguments: Any) -> Any:
        """The call's result. It must raise `error`, if one is given, and leave the caller's `arguments` as they are."""
        before = copy.deepcopy([argument for argument in arguments if not isinstance(argument, KVCacheItem)])
        try:
            if error is None:
                return call()
            with pytest.raises(error) as raised:
                call()
            assert str(raised.value).strip()
            return None
        finally:
            assert before == [argument for argument in arguments if not isinstance(argument, KVCacheItem)]

    def pick(self, number: int) -> Made:
        return self.made[number % len(self.made)]

    def id_at(self, number: int) -> str:
        """An id of any item that was ever made, or one that never was one's."""
        ids = [made.item.kv_cache_id for made in self.made] + list(NO_IDS)
        return ids[number % len(ids)]

    def keep(self, item: KVCacheItem, recipe: Recipe) -> None:
        assert item.metadata.namespace == self.fields["namespace"]
        assert all_bits(layers_of(item.kv_cache)) == all_bits(layers_of(REFERENCE.item(recipe).kv_cache))
        self.made.append(Made(item, recipe, stated(item), copy_of(item)))

    def folder(self, name: str) -> Path:
        return self.root / name

    def path(self, name: str) -> Path:
        return self.folder(name) / self.fields["namespace"] / self.fields["memory_filename"]

    # Making items

    @rule(text=st.sampled_from(TEXTS))
    def extract(self, text: str) -> None:
        self.keep(self.memory.extract(text), ("text", text))

    @rule(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3))
    def extract_several(self, texts: list[str]) -> None:
        items = self.call(None, lambda: self.memory.extract(texts), texts)
        for item, text in zip(items, texts, strict=True):
            self.keep(item, ("text", text))

    @rule(count=st.integers(1, 3), base=st.none() | NUMBERS)
    def extract_turns(self, count: int, base: int | None) -> None:
        earlier = self.pick(base) if base is not None and self.made else None
        assume(earlier is None or earlier.item.metadata.token_count < MOST_TOKENS)
        turns = [dict(turn) for turn in TURNS[:count]]
        item = self.call(None, lambda: self.memory.extract(turns, base=earlier.item if earlier else None), turns)
        for turn in turns:
            turn["content"] = "changed by the caller afterwards"
        self.keep(item, ("turns", tuple(range(count)), earlier.recipe if earlier else None))

    @rule(wrong=st.sampled_from(NO_TEXTS))
    def extract_wrong(self, wrong: Any) -> None:
        self.call(PromptError, lambda: self.memory.extract(wrong), wrong)

    @precondition(lambda self: self.made)
    @rule(number=NUMBERS)
    def extract_text_with_base(self, number: int) -> None:
        self.call(PromptError, lambda: self.memory.extract("more", base=self.pick(number).item))

    @rule(text=st.sampled_from(TEXTS), metadata=st.sampled_from(METADATA), number=st.integers(0, 2))
    def from_textual_memory(self, text: str, metadata: dict[str, Any], number: int) -> None:
        given = TextualMemoryItem(id=f"text-{number}", memory=text, metadata=copy.deepcopy(metadata))
        item = self.call(None, lambda: self.memory.from_textual_memory(given), given)
        source = item.metadata.textual_memory
        assert source is not None and (source.id, source.metadata) == (given.id, given.metadata)
        self.keep(item, ("text", text))
        for value in given.metadata.values():  # the caller's object, which is theirs to change
            if isinstance(value, list):
                value.append("changed by the caller afterwards")
            if isinstance(value, dict):
                value["changed"] = "by the caller afterwards"

    @rule(spoil=st.sampled_from(SPOILS))
    def from_spoilt_textual_memory(self, spoil: Any) -> None:
        """Fields can be assigned, so an object that was good may be good no more."""
        given = TextualMemoryItem(memory=TEXTS[0])
        given.metadata["spoilt"] = spoil
        self.call(ArgumentError, lambda: self.memory.from_textual_memory(given))

    @rule(wrong=st.sampled_from([None, "a text", {"memory": "a text"}]))
    def from_no_textual_memory(self, wrong: Any) -> None:
        self.call(ArgumentError, lambda: self.memory.from_textual_memory(wrong), wrong)

    # Storing and finding them

    @precondition(lambda self: self.made)
    @rule(number=NUMBERS)
    def add(self, number: int) -> None:
        made = self.pick(number)
        known = made.item.kv_cache_id in self.stored
        self.call(DuplicateMemoryError if known else None, lambda: self.memory.add(made.item))
        if not known:
            self.stored[made.item.kv_cache_id] = Record(made.recipe, made.metadata)

    @precondition(lambda self: self.made)
    @rule(numbers=st.lists(NUMBERS, max_size=4))
    def add_several(self, numbers: list[int]) -> None:
        several = [self.pick(number) for number in numbers]
        ids = [made.item.kv_cache_id for made in several]
        twice = len(set(ids)) < len(ids) or not self.stored.keys().isdisjoint(ids)
        self.call(DuplicateMemoryError if twice else None, lambda: self.memory.add([made.item for made in several]))
        if not twice:
            self.stored |= {made.item.kv_cache_id: Record(made.recipe, made.metadata) for made in several}

    @rule(wrong=st.sampled_from(["model", "namespace", "kind"]), good_first=st.booleans())
    def add_wrong(self, wrong: str, good_first: bool) -> None:
        """All or none: the good item before the wrong one is not stored either."""
        good = [made.item for made in self.made if made.item.kv_cache_id not in self.stored][:1] if good_first else []
        bad: Any = "an id"
        error: type[KVMemError] = ArgumentError
        if wrong == "model":
            bad, error = other_models_item(), FingerprintError
            bad.metadata = bad.metadata.model_copy(update={"namespace": self.fields["namespace"]})
        if wrong == "namespace":
            theirs = REFERENCE.item(("text", TEXTS[0]))
            bad = KVCacheItem(theirs.kv_cache, theirs.metadata.model_copy(update={"namespace": "theirs"}))
            error = NamespaceError
        self.call(error, lambda: self.memory.add([*good, bad]))

    @rule(number=NUMBERS)
    def get(self, number: int) -> None:
        wanted = self.id_at(number)
        found = self.memory.get(wanted)
        assert (found.kv_cache_id if found else None) == (wanted if wanted in self.stored else None)

    @rule(numbers=st.lists(NUMBERS, max_size=4))
    def get_by_ids(self, numbers: list[int]) -> None:
        wanted = [self.id_at(number) for number in numbers]
        found = self.call(None, lambda: self.memory.get_by_ids(wanted), wanted)
        ids = [item.kv_cache_id if item else None for item in found]
        assert ids == [each if each in self.stored else None for each in wanted]

    @rule()
    def get_all(self) -> None:
        listed = self.memory.get_all()
        assert [item.kv_cache_id for item in listed] == list(self.stored)
        listed.clear()  # the caller's list

    @rule(verb=st.sampled_from(["get", "get_by_ids", "get_cache", "delete"]), wrong=st.sampled_from([3, None, [3]]))
    def no_ids(self, verb: str, wrong: Any) -> None:
        self.call(ArgumentError, lambda: getattr(self.memory, verb)(wrong), wrong)

    @rule(numbers=st.lists(NUMBERS, max_size=3))
    def get_cache(self, numbers: list[int]) -> None:
        """Several ids, some of which may not be stored; the view is then used up in every way."""
        wanted = [self.id_at(number) for number in numbers]
        whole = bool(wanted) and all(each in self.stored for each in wanted)
        view = self.call(None if whole else UnknownMemoryError, lambda: self.memory.get_cache(wanted), wanted)
        if whole:
            recipes = tuple(self.stored[each].recipe for each in wanted)
            assert all_bits(layers_of(view)) == all_bits(REFERENCE.layers(recipes))
            self.memory.backend.generate("Why?", view, 3)
            view.crop(2)
            view.reset()

    @rule(numbers=st.lists(NUMBERS, max_size=3), as_one=st.booleans())
    def delete(self, numbers: list[int], as_one: bool) -> None:
        ids = [self.id_at(number) for number in numbers]
        given: Any = ids[0] if as_one and ids else ids
        gone = self.stored.keys() & ({given} if isinstance(given, str) else set(given))
        assert self.call(None, lambda: self.memory.delete(given), given) == len(gone)
        for each in gone:
            del self.stored[each]

    @rule()
    def delete_all(self) -> None:
        assert self.memory.delete_all() == len(self.stored)
        self.stored = {}

    # Files and crashes

    @rule(name=st.sampled_from(FOLDERS))
    def dump(self, name: str) -> None:
        assert self.memory.dump(self.folder(name)) == self.path(name)
        self.files[name] = dict(self.stored)

    @rule(name=st.sampled_from(FOLDERS))
    def load(self, name: str) -> None:
        known = name in self.files
        count = self.call(None if known else StorageError, lambda: self.memory.load(self.folder(name)))
        if known:
            self.stored = dict(self.files[name])
            assert count == len(self.stored)

    @rule(name=st.sampled_from(FOLDERS), fraction=FRACTIONS, crash=st.booleans())
    def a_dump_that_fails_midway(self, name: str, fraction: float, crash: bool) -> None:
        whole = self.memory.dump(self.folder("scratch")).stat().st_size
        with files_of_at_most(int(whole * fraction)):
            self.call(StorageError, lambda: self.memory.dump(self.folder(name)))
        if crash:
            self.crash()

    @rule()
    def crash(self) -> None:
        """The memory's object is gone, and another one begins with nothing; the caller keeps the items it has."""
        self.memory = memory_on(tiny_backend("qwen3"), **self.fields)
        self.stored = {}

    @rule(name=st.sampled_from(FOLDERS))
    def restart(self, name: str) -> None:
        self.crash()
        self.load(name)

    @rule(name=st.sampled_from(FOLDERS))
    def the_folder_is_deleted(self, name: str) -> None:
        """What was loaded from it stays."""
        shutil.rmtree(self.folder(name), ignore_errors=True)
        self.files.pop(name, None)

    @precondition(lambda self: self.files)
    @rule(fraction=FRACTIONS, into=st.sampled_from(["cut", "bit"]))
    def load_a_damaged_copy(self, fraction: float, into: str) -> None:
        content = bytearray(self.path(min(self.files)).read_bytes())
        at = int(len(content) * fraction)
        if into == "cut":
            del content[at:]
        else:
            content[at] ^= 1
        damaged = self.path("damaged")
        damaged.parent.mkdir(parents=True, exist_ok=True)
        damaged.write_bytes(content)
        self.call(StorageError, lambda: self.memory.load(self.folder("damaged")))

    @rule()
    def load_another_models_file(self) -> None:
        theirs = memory_on(tiny_backend("llama"), **self.fields)
        theirs.add(theirs.extract(TEXTS[0]))
        theirs.dump(self.folder("theirs"))
        self.call(FingerprintError, lambda: self.memory.load(self.folder("theirs")))

    @rule(verb=st.sampled_from(["dump", "load"]))
    def no_folder(self, verb: str) -> None:
        path = self.root / "a file"
        path.write_text("no folder")
        for wrong, error in ((path, StorageError), ("a\0b", StorageError), (3, ArgumentError), (None, ArgumentError)):
            self.call(error, lambda wrong=wrong: getattr(self.memory, verb)(wrong), wrong)
        assert path.read_text() == "no folder"

    # After every step

    @invariant()
    def what_is_stored_is_what_the_dictionary_says(self) -> None:
        items = self.memory.get_all()
        assert [item.kv_cache_id for item in items] == list(self.stored)
        for item, (id_, record) in zip(items, self.stored.items(), strict=True):
            assert self.memory.get(id_) is item
            assert json.loads(stated(item)) == json.loads(record.metadata)
            fresh = REFERENCE.item(record.recipe)
            assert item.metadata.source_text == fresh.metadata.source_text
            assert item.metadata.tokens == fresh.metadata.tokens
            view = self.memory.get_cache(id_)
            assert view.tokens == item.metadata.tokens and same_tensors(view, fresh.kv_cache)

    @invariant()
    def what_the_caller_has_is_as_it_was(self) -> None:
        for made in self.made:
            assert stated(made.item) == made.metadata and same_bits(made.item, made.tensors)

    @invariant()
    def folders_hold_only_what_was_dumped(self) -> None:
        for name in FOLDERS:
            files = {path for path in self.folder(name).rglob("*") if path.is_file()}
            assert files == ({self.path(name)} if name in self.files else set())


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
