"""The eleven verbs, and every error that they document."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kvmem import KVCacheItem, TextualMemoryItem
from kvmem.cache import observing
from kvmem.cache.dynamic_cache import CacheView, layers_of
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import (
    DamagedFileError,
    DuplicateMemoryError,
    FingerprintError,
    PromptError,
    StorageError,
    UnknownMemoryError,
)
from tests.helpers.tiny import copy_of, greedy_by_transformers, loaded, memory_on, pairs, same_bits

TURNS = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "My dog is called Bodo. What is a good name for a cat?"},
    {"role": "assistant", "content": "Mimi, or Felix."},
]
MORE = [{"role": "user", "content": "And for a fish?"}, {"role": "assistant", "content": "Wanda, of course."}]
TEXTS = [text for text, _ in pairs(3, characters=300, seed=5)]


@pytest.fixture
def memory(qwen3):
    return memory_on(qwen3)


@pytest.fixture
def stored(memory):
    """A memory that holds three items, and their ids."""
    items = memory.extract(TEXTS)
    memory.add(items)
    return memory, [item.kv_cache_id for item in items]


@contextmanager
def counted(backend: HFBackend) -> Iterator[list[int]]:
    """How many tokens each forward pass of the model computes."""
    counts: list[int] = []
    hook = backend.model.get_input_embeddings().register_forward_hook(
        observing(lambda module, args, output: counts.append(output.shape[-2]))
    )
    yield counts
    hook.remove()


# extract


def test_extract_a_text_is_one_item_not_stored(memory, qwen3):
    item = memory.extract(TEXTS[0])
    assert isinstance(item, KVCacheItem) and uuid.UUID(item.kv_cache_id)
    meta = item.metadata
    assert meta.source_text == TEXTS[0] and meta.build_s > 0 and meta.extracted_at.tzinfo is not None
    assert meta.token_count == item.kv_cache.get_seq_length() == len(meta.tokens.token_ids)
    assert meta.kv_bytes == 2 * 2 * 2 * meta.token_count * 32 * 4  # K and V, layers, kv_heads, tokens, head_dim, fp32
    assert meta.fingerprint == qwen3.fingerprint and meta.textual_memory is None
    assert memory.get_all() == [] and memory.get(item.kv_cache_id) is None


def test_extract_a_list_of_texts_is_a_list(memory):
    items = memory.extract(TEXTS)
    assert [item.metadata.source_text for item in items] == TEXTS
    assert len({item.kv_cache_id for item in items}) == 3


def test_extract_turns_is_one_item_that_answers_as_the_conversation(memory, qwen3):
    item = memory.extract(TURNS)
    memory.add(item)
    whole = [*TURNS, {"role": "user", "content": "Who is Bodo?"}]
    ids = tuple(qwen3.tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=True)["input_ids"])
    answer = qwen3.generate("Who is Bodo?", memory.get_cache(item.kv_cache_id), 24)
    assert list(answer.token_ids) == greedy_by_transformers(qwen3, ids, 24)
    assert answer.cached_tokens == item.metadata.token_count > 40


@pytest.mark.parametrize("base_source", [TURNS, TEXTS[0]], ids=["turns", "text"])
def test_extract_with_base_prefills_only_the_new_turns(memory, qwen3, base_source):
    with counted(qwen3) as counts:
        base = memory.extract(base_source)
        before = copy_of(base)
        longer = memory.extract(MORE, base=base)
    assert counts == [base.metadata.token_count, longer.metadata.token_count - base.metadata.token_count]
    assert same_bits(base, before)
    earlier = base_source if isinstance(base_source, list) else [{"role": "system", "content": base_source}]
    rebuilt = memory.extract([*earlier, *MORE])
    assert longer.metadata.tokens == rebuilt.metadata.tokens and longer.kv_cache_id != base.kv_cache_id
    for (keys, values), (rebuilt_keys, rebuilt_values) in zip(
        layers_of(longer.kv_cache), layers_of(rebuilt.kv_cache), strict=True
    ):
        assert torch.allclose(keys, rebuilt_keys, rtol=0, atol=1e-4)
        assert torch.allclose(values, rebuilt_values, rtol=0, atol=1e-4)
    assert longer.metadata.kv_bytes == rebuilt.metadata.kv_bytes


@pytest.mark.parametrize("family_name", ["qwen3", "mistral"])  # mistral's one kv head makes every view contiguous
def test_extract_with_base_stores_no_unused_space(tiny, family_name):
    memory = memory_on(tiny(family_name))
    item = memory.extract(MORE, base=memory.extract(TURNS))
    assert bytes_held(item) == item.metadata.kv_bytes


def bytes_held(item: KVCacheItem) -> int:
    return sum(tensor.untyped_storage().nbytes() for pair in layers_of(item.kv_cache) for tensor in pair)


@pytest.mark.parametrize("nothing", ["", "  \n", []])
def test_extract_nothing_is_refused(memory, nothing):
    with pytest.raises(PromptError, match=r"0 characters|empty"):
        memory.extract(nothing)


def test_extract_one_empty_text_of_several_is_refused(memory):
    with pytest.raises(PromptError, match="0 characters"):
        memory.extract([TEXTS[0], " "])


def test_extract_too_long_names_both_lengths(memory, qwen3):
    text = "word " * 8300
    with pytest.raises(PromptError) as refused, counted(qwen3) as counts:
        memory.extract(text)
    assert "8192 positions" in str(refused.value) and counts == []
    assert f"{len(qwen3.template.memory_tokens(text).token_ids)} tokens" in str(refused.value)


@pytest.mark.parametrize("mixed", [["a text", {"role": "user", "content": "a turn"}], [{"role": "user"}], [3]])
def test_extract_a_mixture_is_refused(memory, mixed):
    with pytest.raises(PromptError, match="A turn is"):
        memory.extract(mixed)


def test_extract_with_base_requires_turns(memory):
    base = memory.extract(TURNS)
    for text in ("a text", ["a text"]):
        with pytest.raises(PromptError, match="base extends"):
            memory.extract(text, base=base)


def test_extract_base_of_another_model_is_refused(memory):
    other = memory_on(HFBackend(loaded("tiny", seed=1))).extract(TURNS)
    with pytest.raises(FingerprintError, match=r"weights: \w+ here"):
        memory.extract(MORE, base=other)


def test_extract_turns_under_plain_is_refused(qwen3_plain):
    with pytest.raises(PromptError, match="template='chat'"):
        memory_on(qwen3_plain).extract(TURNS)


# add, get, get_by_ids, get_all, delete, delete_all


def test_add_and_get(stored):
    memory, ids = stored
    assert [item.kv_cache_id for item in memory.get_all()] == ids
    assert memory.get(ids[1]).kv_cache_id == ids[1] and memory.get("no such id") is None
    assert [item and item.kv_cache_id for item in memory.get_by_ids([ids[2], "no such id", ids[0]])] == [
        ids[2],
        None,
        ids[0],
    ]
    memory.add(memory.extract("One more, and it comes last."))
    assert memory.get_all()[-1].metadata.source_text == "One more, and it comes last."


def test_add_is_all_or_nothing_on_a_stored_id(stored):
    memory, ids = stored
    with pytest.raises(DuplicateMemoryError, match=ids[1]):
        memory.add([memory.extract("A new one, quite harmless."), memory.get(ids[1])])
    assert [item.kv_cache_id for item in memory.get_all()] == ids


def test_add_is_all_or_nothing_on_an_id_given_twice(memory):
    item = memory.extract(TEXTS[0])
    with pytest.raises(DuplicateMemoryError, match=item.kv_cache_id):
        memory.add([item, item])
    assert memory.get_all() == []


def test_add_is_all_or_nothing_on_another_models_item(stored):
    memory, ids = stored
    foreign = memory_on(HFBackend(loaded("tiny", seed=1))).extract(TEXTS[0])
    with pytest.raises(FingerprintError) as refused:
        memory.add([memory.extract("A new one, quite harmless."), foreign])
    assert foreign.kv_cache_id in str(refused.value) and "weights:" in str(refused.value)
    assert [item.kv_cache_id for item in memory.get_all()] == ids


def test_delete_is_idempotent_and_returns_the_number_deleted(stored):
    memory, ids = stored
    assert memory.delete([ids[0], "no such id", ids[0]]) == 1
    assert memory.delete(ids[0]) == 0
    assert [item.kv_cache_id for item in memory.get_all()] == ids[1:]
    assert memory.delete_all() == 2
    assert memory.delete_all() == 0 and memory.get_all() == []


def test_a_view_outlives_its_item(stored, qwen3):
    memory, ids = stored
    expected = qwen3.generate("Why?", memory.get_cache(ids[0]), 8)
    cache = memory.get_cache(ids[0])
    memory.delete_all()
    assert qwen3.generate("Why?", cache, 8) == expected


# get_cache


def test_get_cache_of_one_and_of_several(stored):
    memory, ids = stored
    assert isinstance(memory.get_cache(ids[0]), CacheView)
    assert memory.get_cache(ids[0]).get_seq_length() == memory.get_cache([ids[0]]).get_seq_length()
    both = memory.get_cache(ids[:2])
    assert both.get_seq_length() == len(both.tokens.token_ids) > memory.get_cache(ids[0]).get_seq_length()


def test_get_cache_of_an_unknown_id_names_it(stored):
    memory, ids = stored
    with pytest.raises(UnknownMemoryError, match="no-such-id") as refused:
        memory.get_cache([ids[0], "no-such-id"])
    assert str(refused.value).startswith("Not stored: no-such-id.")  # a KeyError would quote it
    with pytest.raises(UnknownMemoryError, match="needs one id"):
        memory.get_cache([])


def test_get_cache_too_long_together_names_both_lengths(memory):
    half = "word " * 4100
    items = memory.extract([half, half])
    memory.add(items)
    with pytest.raises(PromptError, match=r"A text of 8\d{3} tokens does not fit the model's 8192 positions"):
        memory.get_cache([item.kv_cache_id for item in items])


# from_textual_memory


def test_from_textual_memory_keeps_id_and_metadata(memory):
    text_memory = TextualMemoryItem(memory=TEXTS[0], metadata={"tags": ["python"], "confidence": 0.9})
    item = memory.from_textual_memory(text_memory)
    assert item.metadata.textual_memory.id == text_memory.id != item.kv_cache_id
    assert item.metadata.textual_memory.metadata == {"tags": ["python"], "confidence": 0.9}
    assert item.metadata.source_text == TEXTS[0] and memory.get_all() == []
    with pytest.raises(PromptError, match="0 characters"):
        memory.from_textual_memory(TextualMemoryItem(memory=""))


# dump, load


@pytest.mark.parametrize("filename", ["activation_memory.safetensors", "activation_memory.pickle"])
def test_dump_and_load(qwen3, tmp_path, filename):
    memory = memory_on(qwen3, memory_filename=filename)
    text_memory = TextualMemoryItem(memory=TEXTS[0], metadata={"tags": ["python"]})
    items = [*memory.extract(TEXTS), memory.extract(TURNS), memory.from_textual_memory(text_memory)]
    memory.add(items)
    expected = qwen3.generate("Why?", memory.get_cache(items[3].kv_cache_id), 16)
    path = memory.dump(tmp_path / "not" / "yet" / "there")
    assert path == tmp_path / "not" / "yet" / "there" / filename and path.is_file()
    assert [entry.name for entry in path.parent.iterdir()] == [filename]

    other = memory_on(qwen3, memory_filename=filename)
    other.add(other.extract("It is replaced by what the file holds."))
    assert other.load(path.parent) == len(items)
    assert [item.kv_cache_id for item in other.get_all()] == [item.kv_cache_id for item in items]
    for loaded_item, item in zip(other.get_all(), items, strict=True):
        assert same_bits(loaded_item, copy_of(item))
    assert qwen3.generate("Why?", other.get_cache(items[3].kv_cache_id), 16) == expected
    if filename.endswith("safetensors"):
        assert [item.metadata for item in other.get_all()] == [item.metadata for item in items]


def test_load_that_fails_leaves_the_memory_in_place(stored, tmp_path):
    memory, ids = stored
    with pytest.raises(StorageError, match="activation_memory"):
        memory.load(tmp_path / "nothing here")
    path = memory.dump(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match="activation_memory"):
        memory.load(tmp_path)
    assert [item.kv_cache_id for item in memory.get_all()] == ids


def test_load_of_another_models_file_is_refused(stored, tmp_path):
    memory, _ = stored
    memory.dump(tmp_path)
    other = memory_on(HFBackend(loaded("tiny", seed=1)))
    kept = other.extract("It stays where it is.")
    other.add(kept)
    with pytest.raises(FingerprintError, match="weights"):
        other.load(tmp_path)
    assert other.get_all() == [kept]


# sliding windows


def test_sliding_window_answers_as_the_prompt(sliding):
    memory = memory_on(sliding)
    for text, query in pairs(6, characters=400, seed=6):
        item = memory.extract(text)
        memory.add(item)
        before = copy_of(item)
        ids = sliding.split(query, memory.get_cache(item.kv_cache_id)).ids
        direct = greedy_by_transformers(sliding, ids, 32)
        for _ in range(2):
            answer = sliding.generate(query, memory.get_cache(item.kv_cache_id), 32)
            assert list(answer.token_ids) == direct and answer.cached_tokens == item.metadata.token_count > 24
        assert same_bits(item, before)
        assert bytes_held(item) == item.metadata.kv_bytes  # not the tokens that have left the window


def test_sliding_window_that_has_moved_on_is_prefilled_again_and_says_so(sliding):
    """A view that has grown can't be cropped: its window has dropped tokens that the next query needs."""
    memory = memory_on(sliding)
    text, query = pairs(1, characters=400, seed=6)[0]
    item = memory.extract(text)
    memory.add(item)
    cache = memory.get_cache(item.kv_cache_id)
    first = sliding.generate(query, cache, 16)
    with counted(sliding) as counts:
        again = sliding.generate(query, cache, 16)
    assert again.token_ids == first.token_ids
    assert again.cached_tokens == 0 and counts[0] == again.prompt_tokens
