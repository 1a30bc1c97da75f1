"""How a vLLM server is reached, and what it tells beyond an engine; importing this imports no client."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.engines.vllm.config import VLLMGeneration
from kvmem.models import loading


@dataclass(config=ConfigDict(extra="forbid", protected_namespaces=()))
class VLLMServerConfig:
    """The keys of `extractor_llm["config"]` for the backend `vllm_server`."""

    backend: ClassVar[str] = "vllm_server"

    base_url: str = "http://localhost:8000/v1"
    """Where its OpenAI API begins."""
    model: str = loading.PACKAGED
    """The name that the server serves it by."""
    api_key_env: str | None = None
    """The environment variable that holds the key; None: the server asks for none."""
    tokenizer_name_or_path: str | None = None
    """A hub name, a local folder or `smollm2-135m`; None: what the store's card names, else `model`."""
    store_dir: str | None = None
    """The folder that the server's connector keeps memories in, as seen from here. None: memories are prefixes on the
    server, without tensors."""
    cache_salt: str | None = Field(default=None, min_length=1)
    """The tenant whose blocks are shared; a request's own `cache_salt` comes before it. None: shared with everyone who
    gives none."""
    on_miss: Literal["error", "recompute"] = "error"
    """A memory that the server did not reuse is an InjectionError, or its tokens are counted as recomputed."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    first_token_timeout_s: float = Field(default=60.0, gt=0)
    """The longest silence in a stream: until its first token, and then until each next one."""
    whole_timeout_s: float = Field(default=600.0, gt=0)
    """For a whole answer, streamed or not."""
    parallel_requests: int = Field(default=16, ge=1)
    """How many requests of a batch are under way at once."""


@plain_dataclass(frozen=True)
class StreamTTFT:
    """A streamed answer's times, in seconds from token ids ready to send, HTTP included."""

    first_chunk_s: float
    """Until the server's first chunk: its first token is there, whether or not it is any text yet."""
    first_text_s: float | None
    """Until the first chunk whose text is not empty: what a reader sees. None: no token was text."""
    whole_s: float
    """Until the end of the answer."""
    generation: VLLMGeneration
