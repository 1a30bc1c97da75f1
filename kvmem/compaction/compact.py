"""Makes a compacted item of an item, by a strategy."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from kvmem.cache import BIAS, Compaction, KVCacheItem, dynamic_cache, packed, value_fault
from kvmem.compaction.base import CompactionStrategy, Memory, Repeat
from kvmem.compaction.coverage import check_covered
from kvmem.errors import CompactionError, ConfigError


def compact(item: KVCacheItem, strategy: CompactionStrategy, model: PreTrainedModel, repeat: Repeat) -> KVCacheItem:
    """A new item with fewer entries than tokens, marked lossy. What follows it has the positions behind the text.

    model: the one that built the item. repeat: what makes the model repeat the memory. The new item's `build_s`
    adds the compaction to the item's own. The given item is left as it is.

    Raises CompactionError for an item that is compacted already, and for a model that is not covered, and ConfigError
    for a strategy whose knobs a file can't keep.
    """
    known = item.metadata
    if known.compaction is not None:
        raise CompactionError(
            f"Item {item.kv_cache_id} is compacted already, by {known.compaction.strategy}. Extract the text again, "
            "and compact that."
        )
    if fault := value_fault(strategy.knobs()):
        raise ConfigError(f"The knobs of {strategy.name} can't be kept in a file: knobs{fault}. Use plain JSON values.")
    check_covered(model, known.fingerprint)
    started = time.perf_counter()
    memory = Memory.of(item, model, repeat)
    layers = [packed([head.kept() for head in heads]) for heads in strategy.compact(memory)]
    contents, entries = [kept for kept, _ in layers], tuple(lengths for _, lengths in layers)
    cache = dynamic_cache.from_compacted(contents, entries, known.token_count)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    done = Compaction(
        strategy=strategy.name,
        knobs=strategy.knobs(),
        entries=entries,
        has_bias=any(BIAS in kept for kept in contents),
    )
    mark = f"compacted by {strategy.name} to {100 * done.share(known.token_count):.3g}%"
    metadata = known.model_copy(
        update={
            "build_s": known.build_s + time.perf_counter() - started,
            "kv_bytes": dynamic_cache.nbytes(cache),
            "lossy": ", ".join(filter(None, [known.lossy, mark])),
            "compaction": done,
        }
    )
    return KVCacheItem(cache, metadata)
