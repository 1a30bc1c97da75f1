"""Merges of memories with states, latents or indexer keys: the joint prefill is exact, others refuse by name."""

from __future__ import annotations

import pytest

from kvmem.errors import MergeError
from kvmem.merge import STRATEGIES, strategy
from tests.helpers.architectures import (
    OF_OTHER_SIZES,
    SPARSE,
    WITH_STATES,
    covered,
    greedy_without_cache,
    tiny_architecture,
)
from tests.helpers.tiny import memory_on

TEXTS = [
    "Kiwis are flightless birds of New Zealand.",
    "They lay the largest eggs for their size.",
    "They sleep by day.",
]
QUERY = "Can kiwis fly?"
STEPS = 4
INEXACT = sorted(cls.name for cls in STRATEGIES.classes().values() if not cls.exact)
REFUSED = [*covered(WITH_STATES), *(name for name in covered(OF_OTHER_SIZES) if name in SPARSE)]


def merged(model_type: str, merge: str):
    backend = tiny_architecture(model_type)
    memory = memory_on(backend, merge=strategy(merge))
    items = memory.extract(TEXTS)
    memory.add(items)
    return backend, memory, [item.kv_cache_id for item in items]


@pytest.mark.parametrize("model_type", [*covered(WITH_STATES), *covered(OF_OTHER_SIZES)])
def test_reprefill_is_exact(model_type: str):
    backend, memory, ids = merged(model_type, "Reprefill")
    view = memory.get_cache(ids)
    expected = greedy_without_cache(backend, backend.split(QUERY, view).ids, STEPS)
    answer = backend.generate(QUERY, view, STEPS)
    assert answer.token_ids == expected and answer.cached_tokens == len(view.tokens.token_ids)


@pytest.mark.parametrize("merge", INEXACT)
@pytest.mark.parametrize("model_type", REFUSED)
def test_merges_of_stored_blocks_are_refused_by_name(model_type: str, merge: str):
    _, memory, ids = merged(model_type, merge)
    with pytest.raises(MergeError, match=rf"{merge} does not cover {model_type}.* Use merge=Reprefill"):
        memory.get_cache(ids)
    assert memory.get_cache(ids[:1]).get_seq_length(), "one memory needs no merge"


@pytest.mark.parametrize("model_type", ["deepseek_v3", "falcon"])
def test_blocks_of_other_sizes_can_be_concatenated(model_type: str):
    backend, memory, ids = merged(model_type, "NaiveConcat")
    view = memory.get_cache(ids)
    assert view.get_seq_length() == len(view.tokens.token_ids)
    assert backend.generate(QUERY, view, STEPS).cached_tokens == view.states_at
