"""Tiny models with random weights, real text from Python's documentation, and references by transformers alone."""

from __future__ import annotations

import random
from functools import cache
from pydoc_data.topics import topics

import torch
from transformers import DynamicCache

from kvmem import KVCacheItem, KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache.dynamic_cache import KV, CacheView, layers_of
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.models.loading import Loaded, load
from kvmem.prompt.template import TemplateKind

CPU = torch.device("cpu")
SHAPES = {"qwen3": "tiny", "qwen2": "tiny_qwen2", "llama": "tiny_llama", "mistral": "tiny_mistral"}
"""Family -> the name of its tiny shape with full attention."""

QUESTIONS = (
    "What is the first rule?",
    "Name one exception.",
    "  Which names are bound here?",
    "Why?",
    "Summarise it in a word.",
    "Does the order matter, and if so where?",
    "\n\nIs this allowed in a class body?",
    "How is an error raised?",
)


def loaded(shape: str, seed: int = 0, gain: float = 12.0) -> Loaded:
    """A model of `shape` with random weights times `gain`; at the usual scale the memory hardly affects an answer."""
    result = load(f"random:{shape}", CPU, torch.float32, seed=seed)
    with torch.no_grad():
        for name, parameter in result.model.named_parameters():
            if "norm" not in name and "embed" not in name:
                parameter.mul_(gain)
    return result


@cache
def tiny_backend(family: str) -> HFBackend:
    """A tiny model of the family, fp32, under the chat template; loaded once in a process."""
    return HFBackend(loaded(SHAPES[family]))


def memory_on(backend: HFBackend, **fields: object) -> KVCacheMemory:
    """An empty memory on a loaded backend. `fields`: of KVCacheMemoryConfig."""
    fields = {"template": backend.template.kind, **fields}
    config = KVCacheMemoryConfig(extractor_llm={"backend": "huggingface", "config": {}}, **fields)
    return KVCacheMemory(config, backend)


def kind(given: object) -> str:
    """The id of a test's parameter: its type, because its repr may differ between processes."""
    return type(given).__name__


def view_by(backend: HFBackend, text: str) -> CacheView:
    """A view of a new memory of `text` on this backend."""
    memory = memory_on(backend)
    item = memory.extract(text)
    memory.add(item)
    return memory.get_cache(item.kv_cache_id)


def with_template(backend: HFBackend, kind: TemplateKind) -> HFBackend:
    """The same model under another prompt template."""
    return HFBackend(Loaded(backend.model, backend.tokenizer, backend.fingerprint.origin), kind)


def pairs(count: int, characters: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different memories of `characters` / 2 to `characters` characters, each with a question."""
    chance = random.Random(seed)
    pages = chance.sample(sorted(topics), count)
    lengths = [chance.randint(characters // 2, characters) for _ in pages]
    return [
        (topics[page].strip()[:length], chance.choice(QUESTIONS)) for page, length in zip(pages, lengths, strict=True)
    ]


def copy_of(item: KVCacheItem) -> list[KV]:
    """A copy of the stored tensors."""
    return [(keys.clone(), values.clone()) for keys, values in layers_of(item.kv_cache)]


def same_bits(item: KVCacheItem, before: list[KV]) -> bool:
    """Whether the stored tensors equal those of `before`, to the bit."""
    now = layers_of(item.kv_cache)
    return len(now) == len(before) and all(
        torch.equal(keys.view(torch.int32), old_keys.view(torch.int32))
        and torch.equal(values.view(torch.int32), old_values.view(torch.int32))
        for (keys, values), (old_keys, old_values) in zip(now, before, strict=True)
    )


@torch.inference_mode()
def greedy_by_transformers(
    backend: HFBackend, ids: tuple[int, ...], tokens: int, cache: DynamicCache | None = None, **more: object
) -> list[int]:
    """Up to `tokens` new tokens from transformers' own `generate` with the whole prompt, without the end token."""
    input_ids = torch.tensor([ids])
    out = backend.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=sorted(backend.end_tokens),
        **more,
    )
    answer = out[0, len(ids) :].tolist()
    return answer[:-1] if answer and answer[-1] in backend.end_tokens else answer


@torch.inference_mode()
def last_logits(backend: HFBackend, ids: tuple[int, ...]) -> torch.Tensor:
    """The logits, (vocab,), after the whole prompt, in one forward pass without a cache."""
    return backend.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
