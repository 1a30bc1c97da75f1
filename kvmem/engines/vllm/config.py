"""What a vLLM engine is asked for and what it answers; importing this does not import vLLM."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.engines.base import BackendConfig, FileHandle
from kvmem.engines.generation import Generation, Sampling
from kvmem.engines.huggingface import DTYPES
from kvmem.errors import ConfigError, did_you_mean
from kvmem.models import loading
from kvmem.prompt import Query


@dataclass(config=ConfigDict(extra="forbid", protected_namespaces=()))
class VLLMConfig(BackendConfig):
    """The keys of `extractor_llm["config"]` for the backend `vllm`."""

    backend: ClassVar[str] = "vllm"

    model_name_or_path: str = loading.PACKAGED
    """A hub name, a local folder, `smollm2-135m`, or `random:<shape>`."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: float32 on a CPU and bfloat16 on a GPU."""
    max_model_len: int | None = Field(default=None, ge=16)
    """The engine's window in tokens; None: the model's positions."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for the engine's blocks; None: 1 GiB on a CPU, and on a GPU what `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    block_size: int | None = None
    """Tokens a block; None: the engine's choice (128 on a CPU, 16 on a GPU)."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    enforce_eager: bool | None = None
    """No graphs and no compilation; None: so on a CPU, where compiling takes minutes, and not on a GPU."""
    on_load_failure: Literal["error", "recompute"] = "error"
    """A memory that can't be loaded is an InjectionError, or is computed from its ids and counted as recomputed."""
    store_dir: str | None = None
    """Where the folder of memory files is made; None: the system's folder for temporary files."""
    tokenizer_name_or_path: str | None = None
    """None: the model's own; for random weights the packaged model's."""
    seed: int = 0
    """Seed of random weights."""
    random_weights: Literal["auto", "saved", "in_engine"] = "auto"
    """Random weights are saved to disk, as those of Hugging Face; or made by the engine's workers, each its own shard,
    which no other engine has. auto: saved up to 4 GB."""

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError(f"Unknown dtype {self.dtype!r}. {did_you_mean(self.dtype, ['auto', *DTYPES])}")


@plain_dataclass(frozen=True)
class VLLMGeneration(Generation):
    """An answer, and the engine's own count of what was not computed: `cached_tokens` = local + injected."""

    local_tokens: int = 0
    """From the engine's prefix cache."""
    injected_tokens: int = 0
    """From the memory's file."""
    recomputed_tokens: int = 0
    """Computed after all, because a load failed and `on_load_failure` is recompute."""
    preemptions: int = 0
    """How often the engine, short of blocks, put the request aside and loaded and computed it again."""


@plain_dataclass(frozen=True)
class Ask:
    """One request of a batch."""

    query: Query
    kv_cache: FileHandle | None = None
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    cache_salt: str | None = None
    """Requests share the engine's blocks only with those of the same salt: one for each tenant."""
    past_end: bool = False
    """Go on past end tokens, as a measurement does."""
