"""KVMemConnector: the class that vLLM loads by module path. It hands on to the scheduler's half or the worker's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from kvmem.cache import ModelFingerprint
from kvmem.engines.vllm.connector.block_pins import Pinning
from kvmem.engines.vllm.connector.protocol import FINGERPRINT, FOLDER, HOST_BYTES
from kvmem.engines.vllm.connector.scheduler_side import Scheduling, Transfers
from kvmem.engines.vllm.connector.worker_side import Moving
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

TRIED = ("0.24.", "0.32.")
"""The connector interface is experimental and moves; these are the ones that were read."""


class KVMemConnector(KVConnectorBase_V1):
    """Saves and injects memories; see the package's docstring for what a request says."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_version()
        groups = len(kv_cache_config.kv_cache_groups)
        if groups > 1:
            raise EngineError(f"The model has {groups} kinds of attention layers. Covered: models of one kind.")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise EngineError("Pipeline parallel is not covered: a worker holds only some layers. Use tensor parallel.")
        extra = self._kv_transfer_config.kv_connector_extra_config
        missing = [key for key in (FOLDER, FINGERPRINT) if key not in extra]
        if missing:
            raise EngineError(f"kv_connector_extra_config lacks {', '.join(missing)}. VLLMBackend gives them.")
        folder = Path(extra[FOLDER])
        if role is KVConnectorRole.SCHEDULER:
            block_size = vllm_config.cache_config.block_size
            self.pinning = Pinning(-(-vllm_config.model_config.max_model_len // block_size))
            self.scheduling = Scheduling(folder, block_size, self.pinning)
        else:
            from vllm.distributed import get_tensor_model_parallel_rank

            self.moving = Moving(
                folder,
                ModelFingerprint.model_validate_json(extra[FINGERPRINT]),
                vllm_config,
                get_tensor_model_parallel_rank(),
                extra.get(HOST_BYTES),
            )

    # The scheduler's half.

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self.pinning.pool = gpu_block_pool

    def on_new_request(self, request: Request) -> None:
        self.scheduling.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        return self.scheduling.matched_tokens(request, num_computed_tokens), False  # False: loaded within the step

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.scheduling.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduling.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduling.workers_said(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self.scheduling.finished(request, block_ids)

    # The worker's half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.moving.register(kv_caches)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self.moving.load(self._transfers())

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.moving.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: a save reads the blocks once the forward is through."""

    def wait_for_save(self) -> None:
        self.moving.save(self._transfers())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.moving.take_failed_blocks()

    def build_connector_worker_meta(self) -> Any:
        return self.moving.take_failures()

    def _transfers(self) -> Transfers:
        transfers = self._get_connector_metadata()
        assert isinstance(transfers, Transfers)
        return transfers


def check_version() -> None:
    """Raises EngineError, naming the version, where vLLM's connector interface was not tried."""
    if not vllm.__version__.startswith(TRIED):
        raise EngineError(
            f"vLLM {vllm.__version__} is not covered: the KV connector was written for "
            f"{' and '.join(version + 'x' for version in TRIED)}. Install one of them."
        )
