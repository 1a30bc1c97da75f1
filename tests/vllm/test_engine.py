"""The verbs on vLLM, merges injected as KV, and tenants; a failure is the named error of one request only."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvmem import KVCacheMemory, TextualMemoryItem
from kvmem.cache.dynamic_cache import layers_of
from kvmem.cache.items import KVCacheItem
from kvmem.engines.base import FileHandle
from kvmem.engines.generation import Sampling
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.connector.protocol import file_path
from kvmem.engines.vllm.requests import GenerationRequest, VLLMGeneration
from kvmem.errors import BuildCancelled, ConfigError, EngineError, InjectionError, KVMemError, PromptError, StorageError
from kvmem.prompt.template import TokenizedPrompt
from kvmem.storage import SafetensorsFile
from tests.helpers.tiny import CPU, memory_on, pairs
from tests.vllm.conftest import on_engine

TEXTS = [text for text, _ in pairs(4, 1400, seed=7)]
QUERY = "Which rule is the first?"


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1
    path.write_bytes(whole)


def spoil_the_header(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[2] ^= 0xFF
    path.write_bytes(whole)


def put_another_kind_there(path: Path) -> None:
    path.write_bytes(b"not a memory at all " * 100)


DAMAGES = (cut_off, flip_a_bit, spoil_the_header, put_another_kind_there, Path.unlink)


@dataclass
class Batch:
    """Three memories that are queried together."""

    items: list[KVCacheItem]
    views: list[FileHandle]
    answers: list[VLLMGeneration]

    def again(self, engine: VLLMBackend) -> list[VLLMGeneration | KVMemError]:
        engine.reset()
        return engine.generate_batch([GenerationRequest(QUERY, handle, 8) for handle in self.views])


@pytest.fixture(scope="module")
def three(engine: VLLMBackend) -> Batch:
    items = on_engine(engine).extract(TEXTS[:3])
    views = [engine.store.view(item) for item in items]
    engine.reset()
    return Batch(items, views, [engine.generate(QUERY, handle, 8) for handle in views])


@pytest.fixture
def batch(engine: VLLMBackend, three: Batch) -> Iterator[Batch]:
    """The three memories, whose files are restored after each test."""
    path = three.views[1].file.path
    whole = path.read_bytes()
    yield three
    path.unlink(missing_ok=True)
    path.write_bytes(whole)
    assert three.again(engine) == three.answers


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_one_requests_error(
    engine: VLLMBackend, batch: Batch, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    damage(batch.views[1].file.path)
    first, second, third = batch.again(engine)
    assert (first, third) == (batch.answers[0], batch.answers[2])
    assert isinstance(second, InjectionError)
    assert batch.views[1].file.name in str(second)

    monkeypatch.setattr(engine.config, "on_load_failure", "recompute")
    engine.reset()
    computed = engine.generate(QUERY, batch.views[1], 8)
    assert computed.token_ids == batch.answers[1].token_ids
    assert computed.cached_tokens == 0
    assert computed.recomputed_tokens == batch.items[1].metadata.token_count


def test_the_file_of_another_model_is_one_requests_error(engine: VLLMBackend, batch: Batch) -> None:
    # Loaded again: the file that batch.items[1] is mapped from was damaged in place by the tests before.
    (item,) = SafetensorsFile().load(batch.views[1].file.path, engine.fingerprint, engine.model_config, CPU)
    foreign = item.metadata.fingerprint.model_copy(update={"weights": "0" * 32})
    other = KVCacheItem(item.kv_cache, item.metadata.model_copy(update={"fingerprint": foreign}))
    written = engine.store.write(other)  # kept: the file is deleted with the last reference to this
    written.path.replace(batch.views[1].file.path)
    first, second, third = batch.again(engine)
    assert (first, third) == (batch.answers[0], batch.answers[2])
    assert isinstance(second, InjectionError)
    assert "weights" in str(second)


def test_a_failed_save_leaves_nothing_behind(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    before = sorted(engine.store.folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # like a disk that is full after 1 MiB
    try:
        with pytest.raises(EngineError, match=r"not saved: .*can't be written"):
            memory.extract(TEXTS[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(engine.store.folder.iterdir()) == before
    assert memory.extract(TEXTS[0]).metadata.kv_bytes > 1 << 20


def test_tenants_never_hit_each_others_blocks(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    turns = [{"role": "system", "content": TEXTS[0]}, {"role": "user", "content": QUERY}]
    first = engine.generate(turns, None, 4, cache_salt="tenant a")
    other = engine.generate(turns, None, 4, cache_salt="tenant b")
    again = engine.generate(turns, None, 4, cache_salt="tenant a")
    assert (first.cached_tokens, other.cached_tokens) == (0, 0)
    assert again.local_tokens > 0
    item = memory.extract(TEXTS[1])
    memory.add(item)
    cache_view = memory.get_cache(item.kv_cache_id)
    assert engine.generate(QUERY, cache_view, 4, cache_salt="tenant a").local_tokens == 0
    assert engine.generate(QUERY, cache_view, 4, cache_salt="tenant b").local_tokens == 0
    assert engine.generate(QUERY, cache_view, 4, cache_salt="tenant a").local_tokens > 0


@pytest.mark.parametrize("merge", ["RopeShift", "NaiveConcat"])
def test_a_merge_is_injected_as_kv_and_kept_apart(engine: VLLMBackend, smollm2: HFBackend, merge: str) -> None:
    engine.reset()
    memory = on_engine(engine, merge=merge)
    items = memory.extract([text[:500] for text in TEXTS[:3]])
    memory.add(items)
    ids = [item.kv_cache_id for item in items]
    cache_view = memory.get_cache(ids)
    answer = engine.generate(QUERY, cache_view, 16)
    assert answer.injected_tokens == len(cache_view.tokens.token_ids)

    reference_memory = memory_on(smollm2, merge=merge)
    reference_memory.add(items)
    assert smollm2.generate(QUERY, reference_memory.get_cache(ids), 16).token_ids == answer.token_ids

    whole = engine.split(QUERY, cache_view)  # the same ids as a plain prompt must not find the merge's blocks
    assert engine.answer_prompt(TokenizedPrompt((), whole.ids)).cached_tokens == 0


def test_an_exact_merge_is_a_joined_prefix(engine: VLLMBackend, memory: KVCacheMemory, smollm2: HFBackend) -> None:
    items = memory.extract([text[:500] for text in TEXTS[:3]])
    memory.add(items)
    cache_view = memory.get_cache([item.kv_cache_id for item in items])  # this prefills it
    first = engine.generate(QUERY, cache_view, 16)
    engine.reset()
    second = engine.generate(QUERY, cache_view, 16)
    reference_memory = memory_on(smollm2)
    reference_memory.add(items)
    reference = smollm2.generate(QUERY, reference_memory.get_cache([item.kv_cache_id for item in items]), 16)
    assert first.token_ids == second.token_ids == reference.token_ids
    assert first.local_tokens > 0
    assert (first.injected_tokens, second.cached_tokens) == (0, 0)


def test_turns_extend_a_base_and_only_they_are_prefilled(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    turns = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "I have read it."}]
    base = memory.extract(turns)
    more = [{"role": "user", "content": "Thank you."}, {"role": "assistant", "content": "You are welcome."}]
    extended = memory.extract(more, base=base)
    assert extended.metadata.token_count > base.metadata.token_count
    memory.add([base, extended])
    answer = engine.generate(QUERY, memory.get_cache(extended.kv_cache_id), 16)
    direct = engine.generate([*turns, *more, {"role": "user", "content": QUERY}], None, 16, cache_salt="direct")
    assert answer.injected_tokens == extended.metadata.token_count
    assert (answer.token_ids, answer.prompt_tokens) == (direct.token_ids, direct.prompt_tokens)


def test_a_base_whose_file_is_gone_is_an_error_or_computed_again(
    engine: VLLMBackend, memory: KVCacheMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": TEXTS[1][:600]}, {"role": "assistant", "content": "I have read it."}]
    more = [{"role": "user", "content": "Thank you."}, {"role": "assistant", "content": "You are welcome."}]
    base = memory.extract(turns)
    whole = memory.extract(more, base=base)
    engine.store.file_of(base).path.unlink()
    before = sorted(engine.store.folder.iterdir())
    with pytest.raises(EngineError, match=r"not saved: .*can't be read"):
        memory.extract(more, base=base)
    assert sorted(engine.store.folder.iterdir()) == before

    monkeypatch.setattr(engine.config, "on_load_failure", "recompute")
    again = memory.extract(more, base=base)
    assert again.metadata.tokens == whole.metadata.tokens
    for ours, reference in zip(layers_of(again.kv_cache), layers_of(whole.kv_cache), strict=True):
        for a, b in zip(ours, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_other_verbs(engine: VLLMBackend, memory: KVCacheMemory, tmp_path: Path) -> None:
    source = TextualMemoryItem(memory=TEXTS[0], metadata={"page": 7})
    item = memory.from_textual_memory(source)
    assert item.metadata.textual_memory.id == source.id
    memory.add(item)
    assert memory.get(item.kv_cache_id) is item
    assert memory.get_by_ids(["no such id", item.kv_cache_id]) == [None, item]
    assert item.kv_cache.get_seq_length() == item.metadata.token_count
    before = engine.generate(QUERY, memory.get_cache(item.kv_cache_id), 8)
    memory.dump(tmp_path)
    path = engine.store.file_of(item).path
    assert memory.delete_all() == 1
    del item
    gc.collect()
    assert not path.exists()  # a deleted memory leaves no file
    assert memory.load(tmp_path) == 1
    engine.reset()
    (loaded,) = memory.get_all()
    assert loaded.metadata.textual_memory.metadata == {"page": 7}
    after = engine.generate(QUERY, memory.get_cache(loaded.kv_cache_id), 8)
    assert (after.token_ids, after.injected_tokens) == (before.token_ids, loaded.metadata.token_count)


def test_streaming_gives_what_generate_gives(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    item = memory.extract(TEXTS[2])
    memory.add(item)
    cache_view = memory.get_cache(item.kv_cache_id)
    tokens = list(engine.stream(QUERY, cache_view, 24))
    whole = engine.generate(QUERY, cache_view, 24)
    assert tuple(token.id for token in tokens) == whole.token_ids
    assert "".join(token.text for token in tokens) == whole.text
    stream = engine.stream(QUERY, cache_view, 24)
    next(stream)
    stream.close()  # closing a stream frees the engine
    engine.reset()


def test_sampling_is_its_seeds(engine: VLLMBackend) -> None:
    def sampled(seed: int) -> VLLMGeneration:
        return engine.generate("Tell me a story.", None, 16, Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=seed))

    assert sampled(1) == sampled(1)
    assert sampled(1).token_ids != sampled(2).token_ids


def test_a_request_that_does_not_fit_names_both_lengths(engine: VLLMBackend, memory: KVCacheMemory) -> None:
    with pytest.raises(PromptError, match=r"\d+ tokens.*1536"):
        memory.extract("word " * 3000)
    long, fine = engine.generate_batch(
        [GenerationRequest("word " * 3000), GenerationRequest("What is a word?", max_new_tokens=4)]
    )
    assert isinstance(long, PromptError)
    assert isinstance(fine, VLLMGeneration) and fine.token_ids
    with pytest.raises(ConfigError, match="max_new_tokens"):
        engine.generate(QUERY, None, 0)


def test_an_answer_ends_with_the_window_and_says_so(engine: VLLMBackend) -> None:
    words = "word " * 1500
    left = engine.window - len(engine.split(words).ids)
    assert 2 < left < 8  # fewer than the tokens that the model answers before its end token
    answers = engine.generate_batch([GenerationRequest(words, max_new_tokens=asked) for asked in (2, left, left + 20)])
    assert all(isinstance(answer, VLLMGeneration) for answer in answers)
    assert [(len(answer.token_ids), answer.finish_reason) for answer in answers] == [
        (2, "length"),
        (left, "length"),
        (left, "context_length"),
    ]
    *_, last = engine.stream(words, None, left + 20)
    assert last.finish_reason == "context_length"


@pytest.mark.parametrize(
    "knob", [{"temperature": 0.01}, {"temperature": 2.0}, {"top_p": 1e-9}, {"top_k": 2**31 - 1}, {"seed": 2**63 - 1}]
)
def test_the_extremes_of_sampling_draw_a_token(engine: VLLMBackend, knob: dict[str, float]) -> None:
    answer = engine.generate(QUERY, None, 2, Sampling(**{"temperature": 1.0, **knob}))
    assert answer.token_ids


def test_only_names_that_the_connector_gives_are_files(engine: VLLMBackend) -> None:
    item = engine.build(TEXTS[0][:200])
    given = engine.store.file_of(item).name
    assert file_path(engine.store.folder, given).is_file()
    for name in ("../elsewhere.safetensors", "/etc/passwd", "", "..", f"../{given}", f"{given}/", f"{given}\0", "a\n"):
        with pytest.raises(StorageError, match="not the name of a memory's file"):
            file_path(engine.store.folder, name)


def test_a_build_calls_between_layers_once_before_it_is_sent_and_can_be_cancelled(engine: VLLMBackend) -> None:
    calls: list[int] = []
    item = engine.build(TEXTS[0][:400], between_layers=lambda: calls.append(1))
    assert calls == [1] and item.metadata.token_count > 0

    def cancel() -> None:
        raise BuildCancelled("The text changed.")

    before = sorted(engine.store.folder.iterdir())
    with pytest.raises(BuildCancelled):
        engine.build(TEXTS[0][:400], between_layers=cancel)
    assert sorted(engine.store.folder.iterdir()) == before


def test_a_measured_prefill_is_cold(engine: VLLMBackend) -> None:
    assert engine.max_tokens == 1536
    short_s, long_s = engine.measure_prefill([128, 1024])
    assert 2 * short_s < long_s  # a hit on the second one's first blocks would take as long as the short one
    with pytest.raises(PromptError, match=r"2000 tokens.*1536"):
        engine.measure_prefill([2000])
