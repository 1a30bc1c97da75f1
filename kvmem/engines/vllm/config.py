"""The configuration of the vLLM engine in this process. Importing this does not import vLLM."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.engines.base import BackendConfig
from kvmem.engines.huggingface import DTYPES
from kvmem.errors import ConfigError, did_you_mean
from kvmem.models import loading


@dataclass(config=ConfigDict(extra="forbid", protected_namespaces=()))
class VLLMConfig(BackendConfig):
    """The keys of `extractor_llm["config"]` for the backend `vllm`."""

    backend: ClassVar[str] = "vllm"

    model_name_or_path: str = loading.PACKAGED
    """A hub name, a local folder, `smollm2-135m`, or `random:<shape>`."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: float32 on a CPU and bfloat16 on a GPU."""
    max_model_len: int | None = Field(default=None, ge=16)
    """The engine's window in tokens. None: as many as the model has positions."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for the engine's blocks, in GiB. None: 1 on a CPU; on a GPU what `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    block_size: int | None = None
    """Tokens in a block. None: vLLM's default (128 on a CPU, 16 on a GPU)."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    enforce_eager: bool | None = None
    """Without CUDA graphs and compilation. None: True on a CPU, where compiling takes minutes, and False on a GPU."""
    on_load_failure: Literal["error", "recompute"] = "error"
    """A memory that can't be loaded raises InjectionError, or is computed from its ids and counted as recomputed."""
    store_dir: str | None = None
    """Where the folder of memory files is created. None: the system's folder for temporary files."""
    host_cache_gib: float | None = Field(default=None, gt=0)
    """Host memory for memory files, in GiB, all ranks together: a file that is there is injected without being read.
    With a GPU it is pinned and taken at the start. None: 8 with a GPU, 1 without."""
    read_mib_s: float | None = Field(default=None, gt=0)
    """How many MiB a second each rank reads from memory files at the most, so that other users of a disk or network get
    their share. None: no limit."""
    tokenizer_name_or_path: str | None = None
    """None: the model's own tokenizer; for random weights that of the packaged model."""
    seed: int = 0
    """Seed of random weights."""
    random_weights: Literal["auto", "saved", "in_engine"] = "auto"
    """`saved`: transformers makes the random weights and saves them to disk, so other engines can have the same.
    `in_engine`: each of the engine's workers makes its own shard, and no other engine has these weights.
    `auto`: saved up to 4 GB."""

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError(f"Unknown dtype {self.dtype!r}. {did_you_mean(self.dtype, ['auto', *DTYPES])}")
