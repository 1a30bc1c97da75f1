"""The configuration of a vLLM server's client. Importing this does not import the client."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.models import loading


@dataclass(config=ConfigDict(extra="forbid", protected_namespaces=()))
class VLLMServerConfig:
    """The keys of `extractor_llm["config"]` for the backend `vllm_server`."""

    backend: ClassVar[str] = "vllm_server"

    base_url: str = "http://localhost:8000/v1"
    """Address of the server's OpenAI API."""
    model: str = loading.PACKAGED
    """The name under which the server serves the model."""
    api_key_env: str | None = None
    """The environment variable that holds the API key. None: the server needs no key."""
    tokenizer_name_or_path: str | None = None
    """A hub name, a local folder or `smollm2-135m`. None: the one that the store's card names, or else `model`."""
    store_dir: str | None = None
    """The folder in which the server's connector keeps memories, as a path on this machine. None: memories are prefixes
    in the server's own cache, without tensors."""
    cache_salt: str | None = Field(default=None, min_length=1)
    """The tenant whose blocks this client shares. A request's own `cache_salt` takes precedence. None: it shares blocks
    with all clients that give no salt."""
    on_miss: Literal["error", "recompute"] = "error"
    """A memory that the server did not reuse raises InjectionError, or its tokens are counted as recomputed."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    first_token_timeout_s: float = Field(default=60.0, gt=0)
    """The longest wait in a stream: for the first token, and then for each next one."""
    whole_timeout_s: float = Field(default=600.0, gt=0)
    """The longest wait for a whole answer, streamed or not."""
    parallel_requests: int = Field(default=16, ge=1)
    """How many requests of a batch run at once."""
