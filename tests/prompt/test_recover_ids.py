"""MemOS's pickles: usable if the source text gives their token ids, and refused if not."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvmem import KVCacheMemory
from kvmem.cache.dynamic_cache import layers_of
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import DamagedFileError, FingerprintError
from kvmem.prompt.recover_ids import MEMOS_PREFACE, with_ids_from_text
from tests.helpers.memos import KVCacheItem, KVCacheRecords, OldItem, old_cache, stand_in
from tests.helpers.tiny import copy_of, greedy_by_transformers, memory_on, pairs, same_bits

TEXT, OTHER = (text for text, _ in pairs(2, characters=400, seed=9))
QUERY = "What is the first rule?"

Write = Callable[..., KVCacheMemory]


@torch.inference_mode()
def prefilled(backend: HFBackend, ids: tuple[int, ...]) -> DynamicCache:
    """The cache of `text`, by transformers alone."""
    cache = backend.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    return cache


def as_memos_prefills(backend: HFBackend, text: str) -> tuple[int, ...]:
    """The steps of MemOS 2.0's HFLLM.build_kv_cache."""
    system = [{"role": "system", "content": f"Below is some information about the user.\n{text}"}]
    prompt = backend.tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=False)
    return tuple(backend.tokenizer(prompt).input_ids)


@pytest.fixture(params=["present", "old"])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a pickle as MemOS does, in both layouts, and loads it into a memory: one item called "m"."""

    def write(backend: HFBackend, ids: tuple[int, ...], **metadata: Any) -> KVCacheMemory:
        item: KVCacheItem | OldItem
        cache = prefilled(backend, ids)
        if request.param == "present":
            stand_in(monkeypatch)
            item = KVCacheItem(id="m", memory=cache, metadata=metadata)
        else:
            stand_in(monkeypatch, OldItem)
            item = OldItem(kv_cache_id="m", kv_cache=old_cache(layers_of(cache)), metadata=metadata)
        path = tmp_path / "activation_memory.pickle"
        path.write_bytes(pickle.dumps({"kv_cache_memories": {"m": item}}))
        memory = memory_on(backend, memory_filename=path.name)
        assert memory.load(tmp_path) == 1
        return memory

    return write


def direct(backend: HFBackend, text: str, tokens: int = 12) -> list[int]:
    """The answer to QUERY with `text` as the system turn, by transformers alone."""
    turns = [{"role": "system", "content": text}, {"role": "user", "content": QUERY}]
    rendered = backend.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tuple(backend.tokenizer(rendered, add_special_tokens=False).input_ids)
    return greedy_by_transformers(backend, ids, tokens)


def test_a_text_as_memos_prefills_it_is_usable(family: HFBackend, written: Write) -> None:
    ids = as_memos_prefills(family, TEXT)
    memory = written(family, ids, source_text=TEXT)
    answer = family.generate(QUERY, memory.get_cache("m"), 12)
    assert list(answer.token_ids) == direct(family, MEMOS_PREFACE + TEXT) != direct(family, TEXT)
    assert answer.cached_tokens == len(ids)


def test_a_text_rendered_by_the_template_is_usable(qwen3: HFBackend, written: Write) -> None:
    ids = qwen3.template.memory_tokens(TEXT).token_ids
    memory = written(qwen3, ids, source_text=TEXT)
    answer = qwen3.generate(QUERY, memory.get_cache("m"), 12)
    assert list(answer.token_ids) == direct(qwen3, TEXT) and answer.cached_tokens == len(ids)


def test_a_plain_text_is_usable_under_plain(qwen3_plain: HFBackend, written: Write) -> None:
    ids = tuple(qwen3_plain.tokenizer(TEXT).input_ids)
    memory = written(qwen3_plain, ids, source_text=TEXT)
    answer = qwen3_plain.generate(" And so?", memory.get_cache("m"), 12)
    whole = tuple(qwen3_plain.tokenizer(TEXT + " And so?").input_ids)
    assert list(answer.token_ids) == greedy_by_transformers(qwen3_plain, whole, 12)
    assert answer.cached_tokens >= len(ids) - 1  # the last token may be another before a query


def test_a_plain_text_under_chat_is_prefilled_again_and_the_answer_is_right(qwen3: HFBackend, written: Write) -> None:
    memory = written(qwen3, tuple(qwen3.tokenizer(TEXT).input_ids), source_text=TEXT)
    answer = qwen3.generate(QUERY, memory.get_cache("m"), 12)
    assert list(answer.token_ids) == direct(qwen3, TEXT) and answer.cached_tokens == 0


@pytest.mark.parametrize("word", ["Paris", "x"])
def test_one_word_is_usable(qwen3: HFBackend, written: Write, word: str) -> None:
    """`plain` could not store it, which is not a reason to refuse it under chat."""
    memory = written(qwen3, as_memos_prefills(qwen3, word), source_text=word)
    answer = qwen3.generate(QUERY, memory.get_cache("m"), 12)
    assert list(answer.token_ids) == direct(qwen3, MEMOS_PREFACE + word) and answer.cached_tokens > 10


def test_one_plain_word_under_plain_is_usable(qwen3_plain: HFBackend, written: Write) -> None:
    memory = written(qwen3_plain, tuple(qwen3_plain.tokenizer("Paris").input_ids), source_text="Paris")
    assert memory.get_cache("m").tokens.token_ids == tuple(qwen3_plain.tokenizer("Paris").input_ids)


@pytest.mark.parametrize(
    "source", [TEXT + " More.", OTHER, "", "  \n", None], ids=["longer", "other", "empty", "blank", "none"]
)
def test_a_text_with_another_number_of_tokens_is_refused(qwen3: HFBackend, written: Write, source: str | None) -> None:
    ids = as_memos_prefills(qwen3, TEXT)
    memory = written(qwen3, ids, **({} if source is None else {"source_text": source}))
    item = memory.get("m")
    assert item is not None
    before = copy_of(item)
    with pytest.raises(FingerprintError, match=f"Item m holds {len(ids)} tokens .* Extract it again from the text"):
        memory.get_cache("m")
    assert memory.get("m") is item and same_bits(item, before)


def test_memos_chat_tokens_are_refused_under_plain(qwen3_plain: HFBackend, written: Write) -> None:
    with pytest.raises(FingerprintError, match="Item m holds"):
        written(qwen3_plain, as_memos_prefills(qwen3_plain, TEXT), source_text=TEXT).get_cache("m")


def test_the_composed_text_of_the_records_gives_the_tokens_too(
    qwen3: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    records = KVCacheRecords(text_memories=[TEXT], composed_text_memory=TEXT)
    item = KVCacheItem(id="m", memory=prefilled(qwen3, as_memos_prefills(qwen3, TEXT)), records=records)
    (tmp_path / "memory.pickle").write_bytes(pickle.dumps([item]))
    memory = memory_on(qwen3, memory_filename="memory.pickle")
    memory.load(tmp_path)
    assert list(qwen3.generate(QUERY, memory.get_cache("m"), 12).token_ids) == direct(qwen3, MEMOS_PREFACE + TEXT)


def test_the_stored_item_stays_unverified_and_unchanged(qwen3: HFBackend, written: Write) -> None:
    memory = written(qwen3, as_memos_prefills(qwen3, TEXT), source_text=TEXT)
    item = memory.get("m")
    assert item is not None
    before = copy_of(item)
    answers = [qwen3.generate(QUERY, memory.get_cache("m"), 12) for _ in range(2)]
    assert answers[0] == answers[1] and same_bits(item, before)
    assert memory.get("m") is item and item.metadata.fingerprint is None and item.metadata.tokens.token_ids == ()


@pytest.mark.parametrize("filename", ["kept.safetensors", "kept.pickle"])
def test_an_unverified_item_stays_unverified_in_a_file_of_kvmem(
    qwen3: HFBackend, written: Write, tmp_path: Path, filename: str
) -> None:
    memory = written(qwen3, as_memos_prefills(qwen3, TEXT), source_text=TEXT)
    ours = memory_on(qwen3, memory_filename=filename)
    ours.add(memory.get_all())
    ours.dump(tmp_path)
    ours.load(tmp_path)
    (item,) = ours.get_all()
    assert item.metadata.fingerprint is None
    assert list(qwen3.generate(QUERY, ours.get_cache("m"), 12).token_ids) == direct(qwen3, MEMOS_PREFACE + TEXT)


def test_an_unverified_item_can_be_merged(qwen3: HFBackend, written: Write) -> None:
    memory = written(qwen3, as_memos_prefills(qwen3, TEXT), source_text=TEXT)
    ours = memory.extract(OTHER)
    memory.add(ours)
    for ids in (["m", ours.kv_cache_id], [ours.kv_cache_id, "m"]):
        cache = memory.get_cache(ids)
        prompt = qwen3.split(QUERY, cache)
        answer = qwen3.generate(QUERY, cache, 12)
        assert list(answer.token_ids) == greedy_by_transformers(qwen3, prompt.ids, 12)
        assert answer.cached_tokens == len(cache.tokens.token_ids)


def test_chat_turns_extend_an_unverified_item(qwen3: HFBackend, written: Write) -> None:
    """Its token ids are unknown, so everything is computed, with its source text as the system turn."""
    memory = written(qwen3, as_memos_prefills(qwen3, TEXT), source_text=TEXT)
    turns = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Nothing."}]
    longer = memory.extract(turns, base=memory.get("m"))
    rebuilt = memory.extract([{"role": "system", "content": TEXT}, *turns])
    assert longer.metadata.tokens == rebuilt.metadata.tokens
    for (keys, _), (keys_rebuilt, _) in zip(layers_of(longer.kv_cache), layers_of(rebuilt.kv_cache), strict=True):
        assert torch.allclose(keys, keys_rebuilt, rtol=0, atol=1e-4)


@pytest.mark.parametrize("other", ["qwen2", "llama", "mistral"])
def test_the_file_of_another_model_is_refused_at_load(
    tiny: Callable[[str], HFBackend], qwen3: HFBackend, written: Write, tmp_path: Path, other: str
) -> None:
    written(tiny(other), as_memos_prefills(tiny(other), TEXT), source_text=TEXT)
    memory = memory_on(qwen3, memory_filename="activation_memory.pickle")
    kept = memory.extract(OTHER)
    memory.add(kept)
    with pytest.raises(FingerprintError, match=r"item m can't be from this model: (layers|kv_heads|head_dim)"):
        memory.load(tmp_path)
    assert memory.get_all() == [kept]


def test_a_file_without_keys_is_refused(qwen3: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    (tmp_path / "memory.pickle").write_bytes(pickle.dumps([KVCacheItem(id="m", memory=TEXT)]))
    with pytest.raises(DamagedFileError, match="holds no keys and values"):
        memory_on(qwen3, memory_filename="memory.pickle").load(tmp_path)


def test_an_item_with_known_ids_is_returned_unchanged(qwen3: HFBackend) -> None:
    item = memory_on(qwen3).extract(TEXT)
    assert with_ids_from_text(item, qwen3.template) is item


def test_a_cache_that_has_left_its_sliding_window_is_refused(sliding: HFBackend, written: Write) -> None:
    """The file holds only the last tokens, and does not state it."""
    with pytest.raises(FingerprintError, match="Item m holds"):
        written(sliding, as_memos_prefills(sliding, TEXT), source_text=TEXT).get_cache("m")
