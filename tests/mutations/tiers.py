"""Tiers that give back something else, load nothing or compute nothing, and a slow recompute beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from experiments.bench.tier_probe import TierProbe
from experiments.scenarios import tiers
from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface import HFBackend
from kvmem.tiers import TieredCache
from tests.mutations import baseline, ungraded
from tests.mutations.mutation import SMOLLM2, Mutation, Patch

KIND = "tiers"
SMALL = (
    "scenario=tiers",
    "scenario.context_tokens=[128,160]",
    "scenario.compressed=[disk_int8]",
    "scenario.answer_tokens=4",
)
INT8 = "disk_int8"


def _returns(wanted: Callable[[KVCacheItem], bool], change: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    """Each use gives the wanted items with other keys and values."""

    def make(original: Any) -> Any:
        @contextmanager
        def use(tier: Any, item_id: str) -> Iterator[KVCacheItem]:
            with original(tier, item_id) as item:
                if not wanted(item):
                    yield item
                    return
                layers = [(change(keys), change(values)) for keys, values in dynamic_cache.layers_of(item.kv_cache)]
                cache = dynamic_cache.from_layers(layers, CONFIG[0], item.metadata.token_count)
                yield KVCacheItem(cache, item.metadata, item.kv_cache_id)

        return use

    return Patch(TieredCache, "use", make)


CONFIG: list[Any] = []
"""The model's configuration, once a probe is made."""


def _seen(original: Any) -> Any:
    def init(probe: Any, bench: Any, *given: Any, **named: Any) -> None:
        CONFIG[:] = [bench.backend.model_config]
        original(probe, bench, *given, **named)

    return init


SEEN = Patch(TierProbe, "__init__", _seen)


def _is_lossy(item: KVCacheItem) -> bool:
    return bool(item.metadata.lossy)


def _noise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.std() * torch.randn(tensor.shape, dtype=tensor.dtype)


def _last_is_its_neighbour(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[..., -1, :] = tensor[..., -2, :]
    return changed


def _remembers(original: Any) -> Any:
    """The file is read once, and then the tensors stay in RAM."""
    known: dict[tuple[int, str], KVCacheItem] = {}

    @contextmanager
    def use(tier: Any, item_id: str) -> Iterator[KVCacheItem]:
        if (id(tier), item_id) not in known:
            with original(tier, item_id) as item:
                known[id(tier), item_id] = item
        yield known[id(tier), item_id]

    return use


def _untimed_fetch(original: Any) -> Any:
    """The clock of every tier starts when the memory is loaded."""

    def init(probe: Any, *given: Any, **named: Any) -> None:
        original(probe, *given, **named)
        for name in probe.tier_of:
            run = probe.arms[name].run

            def late(question: str, run: Any = run) -> Any:
                sample = run(question)
                return replace(sample, user_s=sample.user_s - sample.cache_s, cache_s=0.0)

            probe.arms[name].run = late

    return init


def _figures(**changed: float) -> Patch:
    def make(original: Any) -> Any:
        return lambda row: original(replace(row, payload=replace(row.payload, **changed)))

    return Patch(tiers, "judged_again", make)


def _tier(name: str, expected: str, *patches: Patch, model: tuple[str, ...] = (), arm: str = "") -> Mutation:
    return Mutation(KIND, name, expected, patches, (*model, *SMALL), arm)


NOTHING = Patch(HFBackend, "first_token", ungraded.remembered)
MUTATIONS = [
    _tier("a compressed tier returns noise", "int8 states", SEEN, _returns(_is_lossy, _noise), arm=INT8),
    _tier(
        "a compressed tier returns noise to a trained model",
        "int8 states a loss",
        SEEN,
        _returns(_is_lossy, _noise),
        model=SMOLLM2,
        arm=INT8,
    ),
    _tier(
        "a compressed tier loses ten times what it states",
        "int8 states",
        SEEN,
        _returns(_is_lossy, lambda tensor: tensor + 0.5 * _noise(tensor)),
        arm=INT8,
    ),
    _tier(
        "a tier returns the last token's neighbour",
        "differ from the built ones",
        SEEN,
        _returns(lambda item: not item.metadata.lossy, _last_is_its_neighbour),
        arm="disk, warm",
    ),
    _tier("the arms of the tiers compute nothing", ungraded.COUNTED, NOTHING, arm="ram"),
    _tier("recomputing is 3 times slower", baseline.SLOW, baseline.direct_slower(3), model=SMOLLM2),
    _tier(
        "a disk tier reads nothing",
        "the fetch from disk",
        Patch(TieredCache, "use", _remembers),
        model=SMOLLM2,
        arm="disk, cold",
    ),
    _tier(
        "the fetch is not timed",
        "are not in its TTFT|the fetch from",
        Patch(TierProbe, "__init__", _untimed_fetch),
        model=SMOLLM2,
        arm="disk, cold",
    ),
    Mutation(KIND, "three repeats", "give no interval", (), (*SMALL, "scenario.repeats=3")),
    _tier("a saving is too large", "saved_pct is stored as", _figures(saved_pct=99.0)),
    _tier("a tier is as fast as the fastest one", "over_resident is stored as", _figures(over_resident=1.0), arm=INT8),
]
