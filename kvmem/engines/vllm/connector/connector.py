"""KVMemConnector, the class that vLLM loads by its module path.

Each method delegates to the scheduler's half or to the worker's half.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvmem.cache import ModelFingerprint
from kvmem.engines.vllm.connector.block_pins import BlockPins
from kvmem.engines.vllm.connector.counts import Counts
from kvmem.engines.vllm.connector.host_files import HostFiles, budget_pages
from kvmem.engines.vllm.connector.learning import learner_of
from kvmem.engines.vllm.connector.lessons import Lessons
from kvmem.engines.vllm.connector.memory_index import MemoryIndex
from kvmem.engines.vllm.connector.metrics import ConnectorMetrics, ConnectorStats
from kvmem.engines.vllm.connector.orphans import Orphans
from kvmem.engines.vllm.connector.protocol import (
    ADMIN_VARIABLE,
    FINGERPRINT,
    FOLDER,
    HOST_BYTES,
    INJECT_MODE,
    LEARN,
    NAMED,
    NOBODY,
    ORPHANS_AFTER_S,
    PINS,
    READ_BYTES_PER_S,
    SAVES,
    check_version,
)
from kvmem.engines.vllm.connector.scheduler_side import Permissions, SchedulerSide
from kvmem.engines.vllm.connector.transfers import Transfers
from kvmem.engines.vllm.connector.worker_side import WorkerSide
from kvmem.errors import EngineError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


PINNED_BYTES, PAGEABLE_BYTES = 8 << 30, 1 << 30
"""Default size of host memory for files: pinned for a GPU engine; less for a CPU engine, where the page cache holds its
files too."""


def _check_blocks(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raises EngineError unless the blocks keep every token of every layer. `coverage` refuses such models earlier."""
    model, groups = vllm_config.model_config, kv_cache_config.kv_cache_groups
    name, way_out = ", ".join(model.architectures), "Use backend=huggingface, or vLLM without kvmem's connector."
    if len(groups) != 1:
        raise EngineError(f"{name} has {len(groups)} kinds of blocks in vLLM, and the connector moves one. {way_out}")
    spec = groups[0].kv_cache_spec
    slides = isinstance(spec, SlidingWindowSpec) and spec.sliding_window < model.max_model_len
    if type(spec) is not FullAttentionSpec and (slides or not isinstance(spec, SlidingWindowSpec)):
        raise EngineError(
            f"{name} has blocks of {type(spec).__name__} in vLLM, and the connector moves those that keep keys and "
            f"values of every token. {way_out}"
        )


class KVMemConnector(KVConnectorBase_V1):
    """Saves, injects and pins memories, as requests order it in the terms of `protocol`.

    vLLM makes one for the scheduler and one for each worker. Raises EngineError for settings that are not covered.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_version(vllm.__version__)
        _check_blocks(vllm_config, kv_cache_config)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise EngineError("Pipeline parallel is not covered: a worker holds only some layers. Use tensor parallel.")
        extra = self._kv_transfer_config.kv_connector_extra_config
        missing = [key for key in (FOLDER, FINGERPRINT) if key not in extra]
        if missing:
            raise EngineError(f"kv_connector_extra_config lacks {', '.join(missing)}. VLLMBackend gives them.")
        folder = Path(extra[FOLDER])
        fingerprint = ModelFingerprint.model_validate_json(extra[FINGERPRINT])
        ranks = vllm_config.parallel_config.tensor_parallel_size
        on_gpu = vllm_config.device_config.device_type == "cuda"
        host_bytes = extra.get(HOST_BYTES) or (PINNED_BYTES if on_gpu else PAGEABLE_BYTES)
        if role is KVConnectorRole.SCHEDULER:
            block_size = vllm_config.cache_config.block_size
            self.block_pins = BlockPins(-(-vllm_config.model_config.max_model_len // block_size))
            after_s, mode, learn = extra.get(ORPHANS_AFTER_S), extra.get(INJECT_MODE), extra.get(LEARN)
            self.orphans = None if after_s is None else Orphans(folder, after_s)

            def lessons(counts: Counts) -> Lessons:
                learner = learner_of(learn or {}, folder, fingerprint, block_size)
                model = vllm_config.model_config.hf_text_config
                return Lessons(folder, fingerprint, model, learner, ranks, block_size, self.block_pins, counts)

            self.scheduler_side = SchedulerSide(
                folder,
                block_size,
                ranks,
                self.block_pins,
                Permissions(
                    extra.get(SAVES, NOBODY),
                    extra.get(PINS, False),
                    os.environ.get(ADMIN_VARIABLE, "") if mode is not None else "",
                    mode or NAMED,
                ),
                self.orphans,
                HostFiles(host_bytes, ranks, lambda name: (folder / name).exists()),
                max(fingerprint.stored_kv_heads // ranks, 1) / fingerprint.stored_kv_heads,
                None if mode is None else MemoryIndex(folder, fingerprint),
                None if learn is None else lessons,
            )
            if self.orphans is not None:
                self.orphans.start()
        else:
            from vllm.distributed import get_tensor_model_parallel_rank

            self.worker_side = WorkerSide(
                folder,
                fingerprint,
                vllm_config,
                get_tensor_model_parallel_rank(),
                budget_pages(host_bytes, ranks),
                extra.get(READ_BYTES_PER_S),
            )

    # The scheduler's half.

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self.block_pins.pool = gpu_block_pool

    def on_new_request(self, request: Request) -> None:
        self.scheduler_side.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """None while the request's file is read into host memory: the engine serves others and asks again. From there
        it is copied into blocks within one step, so no request holds blocks that are still to be filled."""
        filled_later = False
        return self.scheduler_side.matched_tokens(request, num_computed_tokens), filled_later

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.scheduler_side.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler_side.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler_side.record_outcomes(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self.scheduler_side.on_finished(request, block_ids)

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """The scheduler's counts; a worker has none."""
        if self.role is not KVConnectorRole.SCHEDULER:
            return None
        return ConnectorStats(data=self.scheduler_side.take_counts())

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        return ConnectorStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any, **keywords: Any) -> ConnectorMetrics:
        return ConnectorMetrics(*arguments, **keywords)

    def shutdown(self) -> None:
        if self.role is KVConnectorRole.SCHEDULER:
            self.scheduler_side.stop()
        if self.role is KVConnectorRole.WORKER:
            self.worker_side.stop()

    # The worker's half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker_side.register(kv_caches)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self.worker_side.load(self._transfers())

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.worker_side.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Does nothing: a save reads the blocks after the forward pass."""

    def wait_for_save(self) -> None:
        self.worker_side.save(self._transfers())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Reports no request. It is called in every step, also where nothing is computed, and waits there a moment for
        files, instead of running empty steps one after the other."""
        if self._transfers().idle:
            self.worker_side.wait_for_reads()
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker_side.take_failed_blocks()

    def build_connector_worker_meta(self) -> Any:
        return self.worker_side.take_outcomes()

    def _transfers(self) -> Transfers:
        transfers = self._get_connector_metadata()
        assert isinstance(transfers, Transfers)
        return transfers
