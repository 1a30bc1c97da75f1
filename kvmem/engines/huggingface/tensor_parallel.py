"""Hugging Face transformers, tensor parallel: the processes that torchrun started are one engine.

Each rank holds its share of the weights and, of every memory, the keys and values of its own KV heads. All ranks make
the same calls in the same order. A file holds all heads, so any number of ranks can read it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import DynamicCache

from kvmem import storage
from kvmem.cache import KV, KVCacheItem, Source, TextualMemoryItem, dynamic_cache
from kvmem.engines.base import Backend, BetweenLayers
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.huggingface.config import DTYPES, HFConfig
from kvmem.errors import ConfigError, KVMemError
from kvmem.models import loading
from kvmem.prompt import TemplateKind

CPU = torch.device("cpu")
HEADS = 1
"""The dimension of the KV heads in (batch, kv_heads, tokens, head_dim)."""


@dataclass(config=ConfigDict(extra="forbid", protected_namespaces=()))
class HFRanksConfig(HFConfig):
    """The keys of `extractor_llm["config"]` for the backend `hf_ranks`: those of `huggingface`, but `device` must be
    auto. Each rank takes its own GPU, or the CPU if there is none."""

    backend: ClassVar[str] = "hf_ranks"

    tensor_parallel_size: int = Field(default=1, ge=1)
    """How many processes share the model; 1: as many as torchrun started."""


class HFRanksBackend(HFBackend):
    """`HFBackend` on one of several ranks. Its items hold kv_heads / ranks heads, its files hold all of them."""

    name: ClassVar[str] = HFRanksConfig.backend
    config_class: ClassVar[type] = HFRanksConfig
    takes_compacted: ClassVar[bool] = False

    def __init__(
        self,
        loaded: loading.Loaded,
        template: TemplateKind = "chat",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(loaded, template, chat_template_kwargs)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.shards = self.ranks
        if self.fingerprint.layout is not None:
            raise ConfigError(
                f"{self.model_config.model_type} keeps states or latents in its layers, and ranks share keys and "
                "values by heads. Use backend=huggingface for this model."
            )
        heads = self.fingerprint.kv_heads
        if heads % self.ranks:
            raise ConfigError(
                f"This model has {heads} KV heads, which {self.ranks} ranks can't share evenly. "
                f"Start as many processes as divide {heads}."
            )

    @staticmethod
    def loaded(config: HFConfig) -> loading.Loaded:
        """Loads this rank's share of the model. Raises ConfigError without torchrun."""
        if "LOCAL_RANK" not in os.environ:
            raise ConfigError(
                "backend=hf_ranks is several processes, and this is one. Start it with torchrun --nproc-per-node N, "
                "or use backend=huggingface."
            )
        started, requested = int(os.environ["WORLD_SIZE"]), getattr(config, "tensor_parallel_size", 1)
        if requested not in (1, started):
            raise ConfigError(
                f"tensor_parallel_size={requested}, and torchrun started {started}. Start {requested}, or leave it 1."
            )
        if config.device != "auto":
            raise ConfigError(f"device={config.device} is one device, and ranks have one each. Leave it auto.")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else CPU
        return loading.load(
            config.model_name_or_path,
            device,
            DTYPES.get(config.dtype),
            config.attn_implementation,
            config.seed,
            config.tokenizer_name_or_path,
            tensor_parallel=True,
        )

    def build(
        self,
        source: Source,
        textual_memory: TextualMemoryItem | None = None,
        base: KVCacheItem | None = None,
        between_layers: BetweenLayers | None = None,
        namespace: str = "",
    ) -> KVCacheItem:
        """As `HFBackend.build`, but raises ConfigError for `between_layers`: ranks would wait at different layers."""
        self.check_builds_in_one_step(between_layers)
        item = super().build(source, textual_memory, base, namespace=namespace)
        metadata = item.metadata.model_copy(update={"kv_bytes": self.ranks * item.metadata.kv_bytes})
        kv_cache_id, metadata = self._from_first((item.kv_cache_id, metadata))  # the same on all ranks
        return KVCacheItem(item.kv_cache, metadata, kv_cache_id)

    def check_built(self, cache: DynamicCache, computed: int) -> None:
        """Raises on all ranks if the heads of any rank are not finite, so that no rank waits for another."""
        failed: KVMemError | OSError | None = None
        try:
            super().check_built(cache, computed)
        except KVMemError as error:
            failed = error
        self._raise_any(failed)

    def measure_prefill(self, lengths: Sequence[int]) -> list[float]:
        """The first rank's seconds, on all ranks."""
        seconds: list[float] = self._from_first(super().measure_prefill(lengths))
        return seconds

    def write(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        """Each rank sends its heads to the first one, which writes. Returns, or raises, on all ranks."""
        self.guard.verify()  # on every rank: the hash gathers each weight from all
        whole = [self._with(item, [self._gathered(pair) for pair in _layers(item)]) for item in items]
        failed: KVMemError | OSError | None = None
        if self.rank == 0:
            try:
                Backend.write(self, path, whole)
            except (KVMemError, OSError) as error:
                failed = error
        self._raise_any(failed)

    def read(self, path: Path) -> list[KVCacheItem]:
        """Each rank maps the file, checks all of it, and keeps its own heads.

        Returns, or raises, on all ranks: the file may be missing on another node.
        """
        self.guard.verify()
        items: list[KVCacheItem] = []
        failed: KVMemError | OSError | None = None
        try:
            items = storage.for_filename(path.name).load(path, self.fingerprint, self.model_config, CPU)
        except (KVMemError, OSError) as error:
            failed = error
        self._raise_any(failed)
        return [self._with(item, [self._own(pair) for pair in _layers(item)]) for item in items]

    def reset(self) -> None:
        """Waits for the slowest rank, so that no measurement starts before all ranks are ready."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def _own(self, pair: KV) -> KV:
        keys, values = (tensor.chunk(self.ranks, HEADS)[self.rank].to(self.device) for tensor in pair)
        return keys, values

    def _gathered(self, pair: KV) -> KV:
        """All heads, on the CPU of the first rank; on other ranks the pair unchanged."""
        keys, values = (self._from_all(tensor) for tensor in pair)
        return keys, values

    def _from_all(self, tensor_BHTD: torch.Tensor) -> torch.Tensor:
        own_BHTD = tensor_BHTD.contiguous()
        parts = [torch.empty_like(own_BHTD) for _ in range(self.ranks)] if self.rank == 0 else None
        dist.gather(own_BHTD, parts)
        return own_BHTD if parts is None else torch.cat([part.to(CPU) for part in parts], HEADS)

    def _from_first(self, value: Any) -> Any:
        """The first rank's value, on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def _raise_any(self, own: Exception | None) -> None:
        """Raises the failure of the lowest rank that has one, on every rank."""
        failures: list[Exception | None] = [None] * self.ranks
        dist.all_gather_object(failures, own)
        for failure in failures:
            if failure is not None:
                raise failure

    def _with(self, item: KVCacheItem, layers: Sequence[KV]) -> KVCacheItem:
        cache = dynamic_cache.from_layers(layers, self.model_config, item.kv_cache.get_seq_length())
        return KVCacheItem(dynamic_cache.compact(cache, self.model_config), item.metadata, item.kv_cache_id)


def _layers(item: KVCacheItem) -> list[KV]:
    return dynamic_cache.layers_of(item.kv_cache)
