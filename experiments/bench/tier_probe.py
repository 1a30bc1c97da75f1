"""Stores one memory in every tier of this machine, and answers one prompt with the memory from each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from experiments.bench.bench import Bench
from experiments.bench.quality import Quality, nll, quality_of
from experiments.measurement import page_cache, ttft
from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface import HFBackend
from kvmem.prompt import TokenizedPrompt
from kvmem.tiers import BITS, DiskStore, TieredCache, quantized_bytes

RECOMPUTE = "recompute"
COLD, WARM = "disk, cold", "disk, warm"


@dataclass(frozen=True)
class TierSample:
    """One answer with the memory from one tier."""

    seconds: float
    """TTFT, including the load from the tier."""
    token: int
    """The first token."""
    fetch_s: float = 0.0
    """Seconds of the load."""
    read_s: float = 0.0
    """Disk tiers: seconds of only reading the file, measured just before in the same state of the page cache."""
    cached_pct: float = 0.0
    """Cold disk tier: the share of the file that was still in the page cache, in percent."""


class TierProbe:
    """One memory in every tier, and one prompt."""

    def __init__(
        self, bench: Bench, item: KVCacheItem, question: str, folder: Path, compressed: Sequence[str] = ()
    ) -> None:
        """`folder` holds the disk tiers. `compressed` names the lossy tiers. Raises ConfigError for an unknown tier."""
        assert isinstance(bench.backend, HFBackend)
        self.backend = bench.backend
        self.item, self.before = item, [(k.clone(), v.clone()) for k, v in dynamic_cache.layers_of(item.kv_cache)]
        names = ["gpu", "ram"] if self.backend.device.type == "cuda" else ["ram"]
        kv_bytes = item.metadata.kv_bytes
        self.tiers = {name: TieredCache(self.backend, {name: kv_bytes}) for name in names}
        self.compressed = list(compressed)
        self.tiers["disk"] = TieredCache(self.backend, {"disk": kv_bytes}, folder)
        for name in self.compressed:
            self.tiers[name] = TieredCache(self.backend, {name: self._capacity_bytes(name)}, folder)
        for name, tier in self.tiers.items():
            tier.put(item, name)
        self.path = DiskStore.file_of(folder, item.kv_cache_id)
        self.buffer = bytearray(page_cache.BLOCK_BYTES)
        cache_view = dynamic_cache.view_of(item.kv_cache, item.metadata.tokens, self.backend.model_config)
        self.prompt = self.backend.split(question, cache_view)
        self.arms: dict[str, Callable[[], TierSample]] = {
            **{name: partial(self._answer, name) for name in names},
            WARM: self._warm,
            COLD: self._cold,
            **{name: partial(self._answer, name) for name in self.compressed},
            RECOMPUTE: self._recompute,
        }

    def round(self, rng: random.Random) -> dict[str, TierSample]:
        """One sample of each tier, measured in random order."""
        samples = {name: self.arms[name]() for name in rng.sample(sorted(self.arms), len(self.arms))}
        return {name: samples[name] for name in self.arms}

    def wrong(self, first_tokens: int) -> str:
        """What is wrong, as text; "" if every exact tier returns the built tensors, and all answers agree.

        `first_tokens` is the number of different first tokens among the answers. It counts in float32 only.
        """
        exact = self.tiers.keys() - set(self.compressed)
        found = [name for name in self.tiers if name in exact and not self._same_bits(name, self.tiers[name])]
        wrong = [f"the tensors from {name} differ from the built ones" for name in found]
        if first_tokens > 1 and self.backend.dtype == torch.float32:
            wrong.append("the answers begin with different tokens")
        return "; ".join(wrong)

    def quality(self, steps: int) -> dict[str, Quality]:
        """The quality of the item from each compressed tier. `steps` greedy tokens are compared."""
        found = {}
        direct = ttft.trace(self.backend, TokenizedPrompt((), self.prompt.ids), None, steps)
        for name in self.compressed:
            with self.tiers[name].use(self.item.kv_cache_id) as item:
                found[name] = quality_of(self.backend, item, self.prompt, direct)
        return found

    def nll(self) -> float | None:
        """The score (`quality.nll`) of the memory as it was built."""
        return nll(self.backend, self.item)

    def nbytes(self, name: str) -> int:
        """The size of the memory in a tier, in bytes."""
        return self.tiers[name].nbytes(self.item.kv_cache_id)

    def close(self) -> None:
        for tier in self.tiers.values():
            tier.close()

    def _capacity_bytes(self, name: str) -> int:
        """The capacity that a compressed tier needs for the item. `TieredCache` rejects unknown names."""
        scheme, metadata = name.removeprefix("disk_"), self.item.metadata
        quantized = quantized_bytes(self.backend.fingerprint, scheme, metadata.token_count) if scheme in BITS else 0
        return max(metadata.kv_bytes, quantized)

    def _same_bits(self, name: str, tier: TieredCache) -> bool:
        with tier.use(self.item.kv_cache_id) as item:
            now = [tensor for pair in dynamic_cache.layers_of(item.kv_cache) for tensor in pair]
            return all(torch.equal(a, b) for a, b in zip(now, (t for pair in self.before for t in pair), strict=True))

    def _answer(self, name: str) -> TierSample:
        ttft.synchronize(self.backend.device)
        started = time.perf_counter()
        with self.tiers[name].use(self.item.kv_cache_id) as item:
            fetched = time.perf_counter()
            cache = dynamic_cache.view_of(item.kv_cache, item.metadata.tokens, self.backend.model_config)
            token = self.backend.first_token(self.prompt, cache)
            done = time.perf_counter()
        return TierSample(done - started, token.id, fetched - started)

    def _warm(self) -> TierSample:
        page_cache.read_s(self.path, self.buffer)
        read_s = page_cache.read_s(self.path, self.buffer)
        return replace(self._answer("disk"), read_s=read_s)

    def _cold(self) -> TierSample:
        page_cache.drop(self.path)
        read_s = page_cache.read_s(self.path, self.buffer)
        page_cache.drop(self.path)
        cached_pct = page_cache.resident_pct(self.path)
        return replace(self._answer("disk"), read_s=read_s, cached_pct=cached_pct)

    def _recompute(self) -> TierSample:
        ttft.synchronize(self.backend.device)
        started = time.perf_counter()
        token = self.backend.first_token(TokenizedPrompt((), self.prompt.ids))
        return TierSample(time.perf_counter() - started, token.id)
