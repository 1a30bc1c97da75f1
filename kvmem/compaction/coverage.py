"""Which models a compacted memory is right for, measured on the model when a compaction is first asked for.

Attention over a set does not depend on the order of its entries, and an entry that stands there twice with log(1/2)
added to both scores counts once. So a memory whose heads are shuffled, doubled in part, and of different lengths gives
the logits of the memory itself, if the model takes positions and masks as it has to. ALiBi, whose scores depend on
where an entry stands, does not, and a kernel without masks does not either.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import BIAS, KV, PACKED_KEYS, PACKED_VALUES, MemoryTokens, ModelFingerprint, dynamic_cache, packed
from kvmem.errors import CompactionError, ModelError
from kvmem.models import prefill

PROBE_IDS, NEW_IDS = (5, 3, 8, 2, 9, 4, 7, 6), (4, 2, 6)
KEPT = 5
"""How many entries of the probe each head keeps where all heads keep as many."""
EFFECT_SHARE, UNITS = 0.01, 8
"""By how much logits may differ: a share of what the memory changes in them, or units in the last place of the largest,
the larger one. Random weights of a small size hardly look at a memory, and bfloat16 rounds."""

FORWARD_ERRORS = (TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError, RuntimeError)
"""What the forward pass of a model raises for a mask or a cache that it does not take. It is foreign code."""

WAY_OUT = "Extract without compaction."

_measured: WeakKeyDictionary[PreTrainedModel, tuple[ModelFingerprint | None, str]] = WeakKeyDictionary()
_lock = threading.Lock()


def check_covered(model: PreTrainedModel, fingerprint: ModelFingerprint | None) -> None:
    """Raises CompactionError, with the reason, for a model on which compacted memories would be wrong.

    fingerprint: what the model is now. It is measured once, by seven forward passes of at most 8 tokens, and again for
    another fingerprint.
    """
    with _lock:
        known, fault = _measured.get(model, (None, None))
        if fault is None or known != fingerprint:
            fault = _fault(model, fingerprint)
            _measured[model] = fingerprint, fault
    if fault:
        raise CompactionError(f"Compaction does not cover {model.config.model_type}: {fault}. {WAY_OUT}")


def _fault(model: PreTrainedModel, fingerprint: ModelFingerprint | None) -> str:
    """Why the model is not covered, as a sentence; "" if it is."""
    config = model.config.get_text_config(decoder=True)
    if dynamic_cache.has_sliding_layers(config):
        return "its layers have a sliding window, and drop entries by themselves"
    if (fingerprint is not None and fingerprint.layout is not None) or (
        not dynamic_cache.keeps_keys_and_values_only(config)
        or not dynamic_cache.has_equal_layers(config)
        or dynamic_cache.layer_count(config) != config.num_hidden_layers
    ):
        return "its layers do not all keep keys and values of the same heads"
    try:
        return _measured_fault(model)
    except torch.OutOfMemoryError:
        raise
    except (ModelError, *FORWARD_ERRORS) as error:
        said = (str(error).strip().splitlines() or ["no message"])[0]
        return f"a compacted probe raises {type(error).__name__} ({said})"


@torch.inference_mode()
def _measured_fault(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    cache = dynamic_cache.empty(config)
    prefill(model, PROBE_IDS, cache)
    layers = dynamic_cache.layers_of(cache)
    alone = _answer(model, dynamic_cache.empty(config))
    whole = _answer(model, dynamic_cache.from_layers([(k.clone(), v.clone()) for k, v in layers], config))
    everything = range(len(PROBE_IDS))
    shuffled = _answer(model, _scrambled(model, layers, everything, doubled=True))
    if fault := _difference(shuffled, whole, alone, model.dtype, "its scores depend on where an entry stands"):
        return fault
    some = _answer(model, _scrambled(model, layers, range(KEPT), doubled=True))
    even = _answer(model, _scrambled(model, layers, range(KEPT), doubled=False))
    return _difference(even, some, alone, model.dtype, "positions do not go on behind the text of a shorter memory")


def _answer(model: PreTrainedModel, cache: DynamicCache) -> torch.Tensor:
    """The logits behind several new tokens, and behind one more, (2, vocab)."""
    return torch.stack([prefill(model, NEW_IDS, cache), prefill(model, NEW_IDS[:1], cache)]).float()


def _scrambled(model: PreTrainedModel, layers: Sequence[KV], kept: Sequence[int], doubled: bool) -> DynamicCache:
    """A view of the entries `kept` of the probe, in another order in each head.

    doubled: some of them stand there twice, as many as make the heads differ in length, with their scores lowered.
    """
    contents, lengths = [], []
    for number, (keys, values) in enumerate(layers):
        heads = []
        for head in range(keys.shape[1]):
            shift = (number + head) % len(kept)
            order = [*kept[shift:], *kept[:shift]]
            twice = order[: 1 + (number + head) % 3] if doubled else []
            at_N = torch.tensor([*twice, *order], device=keys.device)
            made = {PACKED_KEYS: keys[0, head, at_N], PACKED_VALUES: values[0, head, at_N]}
            if doubled:
                bias_N = [-math.log(2.0) if entry in twice else 0.0 for entry in at_N.tolist()]
                made[BIAS] = torch.tensor(bias_N, dtype=keys.dtype, device=keys.device)[:, None]
            heads.append(made)
        layer, entries = packed(heads)
        contents.append(layer)
        lengths.append(entries)
    stored = dynamic_cache.from_compacted(contents, lengths, len(PROBE_IDS))
    ids = MemoryTokens(source="", template="", token_ids=PROBE_IDS, header_tokens=0, body_end=len(PROBE_IDS))
    return dynamic_cache.view_of(stored, ids, model.config.get_text_config(decoder=True))


def _difference(ours: torch.Tensor, theirs: torch.Tensor, without: torch.Tensor, dtype: torch.dtype, fault: str) -> str:
    """`fault` with the difference between two answers, if rounding does not explain it; "" if it does."""
    off, effect = (float((theirs - other).abs().max()) for other in (ours, without))
    rounding = UNITS * torch.finfo(dtype).eps * float(theirs.abs().max())
    return "" if off <= max(EFFECT_SHARE * effect, rounding) else f"{fault} (logits differ by {off:.2g})"
