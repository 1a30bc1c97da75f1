"""Stores one memory in every tier of this machine, and answers prompts with the memory from each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from experiments.bench.bench import Bench
from experiments.bench.judging import judging_arms
from experiments.bench.quality import kv_distance, loss_of, score
from experiments.measurement import Arm, Layers, Sample, Trace, comparable, page_cache, ttft
from experiments.results import Loss
from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface import HFBackend
from kvmem.prompt import TokenizedPrompt
from kvmem.tiers import BITS, DiskStore, TieredCache, quantized_bytes

RECOMPUTE = "recompute"
COLD, WARM = "disk, cold", "disk, warm"
IN_MEMORY = ("gpu", "ram")


def reads_file(arm: str) -> bool:
    """Whether an arm reads its memory from a file."""
    return arm not in (*IN_MEMORY, RECOMPUTE)


class TierProbe:
    """One memory in every tier, and prompts that continue it.

    `arms` are the methods to measure: one for each tier, recomputing, and those that the verdict needs.
    """

    def __init__(
        self, bench: Bench, item: KVCacheItem, questions: Sequence[str], folder: Path, compressed: Sequence[str] = ()
    ) -> None:
        """`folder` holds the disk tiers. `compressed` names the lossy tiers. Raises ConfigError for an unknown tier."""
        assert isinstance(bench.backend, HFBackend)
        self.backend = bench.backend
        self.item = item
        self.built: Layers = [tuple(tensor.clone() for tensor in layer) for layer in comparable(item.kv_cache)]
        self.exact_score = score(self.backend, item) if compressed else None
        names = list(IN_MEMORY) if self.backend.device.type == "cuda" else ["ram"]
        self.resident = names[0]
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
        self.read_s: dict[str, list[float]] = {WARM: [], COLD: []}
        """Seconds of only reading the file, just before each call, in the same state of the page cache."""
        self.cached_pct: list[float] = []
        """The share of the file that was still in the page cache before each cold call, in percent."""
        cache_view = dynamic_cache.view_of(item.kv_cache, item.metadata.tokens, self.backend.model_config)
        self.prompts = {question: self.backend.split(question, cache_view) for question in questions}
        self.prompt = self.prompts[questions[0]]
        self._in_use = ExitStack()
        self.tier_of = {**{name: name for name in names}, WARM: "disk", COLD: "disk"}
        self.tier_of |= {name: name for name in self.compressed}
        """The tier of each arm that loads the memory, the fastest first."""
        prepare = {WARM: self._warm, COLD: self._cold}
        self.arms = {
            **{
                arm: Arm(partial(self._answer, tier), prepare.get(arm, self._free))
                for arm, tier in self.tier_of.items()
            },
            RECOMPUTE: Arm(self._recompute, self._free),
            **judging_arms(bench, lambda question: self.prompts[str(question)]),
        }

    def trace(self, arm: str, steps: int) -> Trace:
        """The arm's greedy answer to the first question."""
        if arm == RECOMPUTE:
            return ttft.trace(self.backend, TokenizedPrompt((), self.prompt.ids), None, steps)
        with self.used(arm) as item:
            return ttft.trace(self.backend, self.prompt, partial(self._view, item), steps)

    def kv_off_built(self, arm: str) -> float | None:
        """How far the KV that the arm loads is from what was stored; None for recomputing."""
        if arm == RECOMPUTE:
            return None
        with self.used(arm) as item:
            return kv_distance(item, self.built)

    def loss(self, arm: str) -> Loss | None:
        """What the arm's tier loses; None for tiers that are exact."""
        if arm not in self.compressed:
            return None
        with self.used(arm) as item:
            return loss_of(self.backend, arm.removeprefix("disk_"), item, self.built, self.exact_score)

    def nbytes(self, arm: str) -> int:
        """The size of the memory in an arm's tier, in bytes. Recomputing has that of the exact memory."""
        if arm == RECOMPUTE:
            return self.item.metadata.kv_bytes
        return self.tiers[self.tier_of[arm]].nbytes(self.item.kv_cache_id)

    @contextmanager
    def used(self, arm: str) -> Iterator[KVCacheItem]:
        with self.tiers[self.tier_of[arm]].use(self.item.kv_cache_id) as item:
            yield item

    def close(self) -> None:
        self._free()
        for tier in self.tiers.values():
            tier.close()

    def _capacity_bytes(self, name: str) -> int:
        """The capacity that a compressed tier needs for the item. `TieredCache` rejects unknown names."""
        scheme, metadata = name.removeprefix("disk_"), self.item.metadata
        quantized = quantized_bytes(self.backend.fingerprint, scheme, metadata.token_count) if scheme in BITS else 0
        return max(metadata.kv_bytes, quantized)

    def _view(self, item: KVCacheItem) -> dynamic_cache.CacheView:
        metadata = item.metadata
        return dynamic_cache.view_of(
            item.kv_cache, metadata.tokens, self.backend.model_config, metadata.lossy, self.backend.fingerprint
        )

    def _answer(self, tier: str, question: str) -> Sample:
        """One first token, from the prompt's ids. The item is freed before the next call, outside of its time."""
        prompt = self.prompts[question]
        ttft.synchronize(self.backend.device)
        started = time.perf_counter()
        item = self._in_use.enter_context(self.tiers[tier].use(self.item.kv_cache_id))
        fetched = time.perf_counter()
        cache = self._view(item)
        token = self.backend.first_token(prompt, cache)
        done = time.perf_counter()
        held = self.backend.held_tokens(prompt, cache)
        return Sample(done - fetched, done - started, fetched - started, token, prompt, held, split_s=0.0)

    def _recompute(self, question: str) -> Sample:
        prompt = TokenizedPrompt((), self.prompts[question].ids)
        ttft.synchronize(self.backend.device)
        started = time.perf_counter()
        token = self.backend.first_token(prompt)
        seconds = time.perf_counter() - started
        return Sample(seconds, seconds, 0.0, token, prompt, split_s=0.0)

    def _free(self) -> None:
        self._in_use.close()

    def _warm(self) -> None:
        self._free()
        page_cache.read_s(self.path, self.buffer)
        self.read_s[WARM].append(page_cache.read_s(self.path, self.buffer))

    def _cold(self) -> None:
        self._free()  # mapped pages stay in the page cache
        page_cache.drop(self.path)
        self.read_s[COLD].append(page_cache.read_s(self.path, self.buffer))
        page_cache.drop(self.path)
        self.cached_pct.append(page_cache.resident_pct(self.path))
