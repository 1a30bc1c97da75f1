"""One memory in every tier of this machine, and one prompt that is answered behind it from each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.bench.bench import Bench
from experiments.bench.quality import Quality, graded, nll
from experiments.measurement import page_cache, ttft
from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface import HFBackend
from kvmem.prompt import TokenizedPrompt
from kvmem.tiers import BITS, DiskStore, TieredCache, quantized_bytes

RECOMPUTE = "recompute"
COLD, WARM = "disk, cold", "disk, warm"


@dataclass(frozen=True)
class Taken:
    """One answer from one place: to its first token, and the parts that a disk tier has."""

    seconds: float
    token: int
    fetch_s: float = 0.0
    read_s: float = 0.0
    """What reading the file took right before, in the same state of the page cache."""
    cached_pct: float = 0.0


class TierProbe:
    """One memory in every tier, and one prompt behind it."""

    def __init__(
        self, bench: Bench, item: KVCacheItem, question: str, folder: Path, compressed: Sequence[str] = ()
    ) -> None:
        """compressed: the tiers that lose, by name."""
        assert isinstance(bench.backend, HFBackend)
        self.backend = bench.backend
        self.item, self.before = item, [(k.clone(), v.clone()) for k, v in dynamic_cache.layers_of(item.kv_cache)]
        names = ["gpu", "ram"] if self.backend.device.type == "cuda" else ["ram"]
        room = item.metadata.kv_bytes
        self.tiers = {name: TieredCache(self.backend, {name: room}) for name in names}
        self.compressed = list(compressed)
        self.tiers["disk"] = TieredCache(self.backend, {"disk": room}, folder)
        for name in self.compressed:
            self.tiers[name] = TieredCache(self.backend, {name: self._compressed_room(name)}, folder)
        for name, items in self.tiers.items():
            items.put(item, name)
        self.path = DiskStore.file_of(folder, item.kv_cache_id)
        self.buffer = bytearray(page_cache.BLOCK_BYTES)
        cache_view = dynamic_cache.view_of(item.kv_cache, item.metadata.tokens, self.backend.model_config)
        self.prompt = self.backend.split(question, cache_view)
        memory, lossy = ({n: (lambda n=n: self._answer(n)) for n in places} for places in (names, self.compressed))
        self.arms: dict[str, Callable[[], Taken]] = {
            **memory,
            WARM: self._warm,
            COLD: self._cold,
            **lossy,
            RECOMPUTE: self._recompute,
        }

    def round(self, rng: random.Random) -> dict[str, Taken]:
        taken = {name: self.arms[name]() for name in rng.sample(sorted(self.arms), len(self.arms))}
        return {name: taken[name] for name in self.arms}

    def wrong(self, first_tokens: int) -> str:
        """What is not as it should be; "" if every place gave the built bits, and every answer began alike."""
        exact = self.tiers.keys() - set(self.compressed)
        found = [name for name in self.tiers if name in exact and not self._same_bits(name, self.tiers[name])]
        wrong = [f"the tensors from {name} are not those that were built" for name in found]
        if first_tokens > 1 and self.backend.dtype == torch.float32:
            wrong.append("the answers begin with different tokens")
        return "; ".join(wrong)

    def quality(self, steps: int) -> dict[str, Quality]:
        """What the item from each compressed tier is still worth, by `steps` greedy tokens and by likelihood."""
        found = {}
        direct = ttft.trace(self.backend, TokenizedPrompt((), self.prompt.ids), None, steps)
        for name in self.compressed:
            with self.tiers[name].use(self.item.kv_cache_id) as item:
                found[name] = graded(self.backend, item, self.prompt, direct)
        return found

    def nll(self) -> float | None:
        """Of the memory as it was built; None: too short to tell."""
        return nll(self.backend, self.item)

    def nbytes(self, name: str) -> int:
        return self.tiers[name].nbytes(self.item.kv_cache_id)

    def close(self) -> None:
        for items in self.tiers.values():
            items.close()

    def _compressed_room(self, name: str) -> int:
        """Bytes for the item; a name that is no tier is for `TieredCache` to refuse."""
        scheme, known = name.removeprefix("disk_"), self.item.metadata
        is_of, tokens = self.backend.fingerprint, known.token_count
        return max(known.kv_bytes, quantized_bytes(is_of, scheme, tokens) if scheme in BITS else 0)

    def _same_bits(self, name: str, items: TieredCache) -> bool:
        with items.use(self.item.kv_cache_id) as item:
            now = [tensor for pair in dynamic_cache.layers_of(item.kv_cache) for tensor in pair]
            return all(torch.equal(a, b) for a, b in zip(now, (t for pair in self.before for t in pair), strict=True))

    def _answer(self, name: str) -> Taken:
        ttft.synchronize(self.backend.device)
        started = time.perf_counter()
        with self.tiers[name].use(self.item.kv_cache_id) as item:
            fetched = time.perf_counter()
            cache = dynamic_cache.view_of(item.kv_cache, item.metadata.tokens, self.backend.model_config)
            token = self.backend.first_token(self.prompt, cache)
            done = time.perf_counter()
        return Taken(done - started, token.id, fetched - started)

    def _warm(self) -> Taken:
        page_cache.read_s(self.path, self.buffer)
        read_s = page_cache.read_s(self.path, self.buffer)
        taken = self._answer("disk")
        return Taken(taken.seconds, taken.token, taken.fetch_s, read_s)

    def _cold(self) -> Taken:
        page_cache.drop(self.path)
        read_s = page_cache.read_s(self.path, self.buffer)
        page_cache.drop(self.path)
        cached_pct = page_cache.resident_pct(self.path)
        taken = self._answer("disk")
        return Taken(taken.seconds, taken.token, taken.fetch_s, read_s, cached_pct)

    def _recompute(self) -> Taken:
        ttft.synchronize(self.backend.device)
        started = time.perf_counter()
        token = self.backend.first_token(TokenizedPrompt((), self.prompt.ids))
        return Taken(time.perf_counter() - started, token.id)
