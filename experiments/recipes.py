"""Ways to pass a stored cache to a Hugging Face model that are not ours, to stand beside it in one run."""

from __future__ import annotations

import time
from typing import cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from experiments import measure
from experiments.measure import Sample, synchronize
from kvmem import dynamic_cache
from kvmem.backends import Backend
from kvmem.backends.hf import HFBackend
from kvmem.backends.measured import FirstToken
from kvmem.errors import ConfigError
from kvmem.items import KVCacheItem, MemoryTokens
from kvmem.prompt import Query, TokenizedPrompt


def shared_tensors_arm(backend: Backend, item: KVCacheItem, tokens: MemoryTokens, query: Query) -> measure.Arm:
    """`shared_tensors` as an arm of a comparison; ConfigError on an engine that is not Hugging Face's."""
    if not isinstance(backend, HFBackend):
        raise ConfigError(f"The shared-tensors recipe is Hugging Face's, and this is backend={type(backend).name}.")
    prompt = backend.template.split(tokens, query)
    return lambda: shared_tensors(backend, item, prompt)


@torch.inference_mode()
def shared_tensors(backend: HFBackend, item: KVCacheItem, prompt: TokenizedPrompt) -> Sample:
    """A plain DynamicCache whose layers are given the stored tensors, and transformers' own forward: nothing else."""
    started = time.perf_counter()
    cache = DynamicCache(config=backend.model_config)
    layers = cast("list[DynamicLayer]", cache.layers)
    for layer, (keys, values) in zip(layers, dynamic_cache.layers_of(item.kv_cache), strict=True):
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
    synchronize(backend.device)
    ready = time.perf_counter()
    ids_BT = torch.tensor([prompt.query_ids], device=backend.device)
    logits = backend.model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = FirstToken(int(logits[0, -1].argmax()), len(prompt.memory_ids))
    done = time.perf_counter()
    return Sample(done - ready, done - started, ready - started, token, prompt, len(prompt.memory_ids))
