"""The engines that MemScheduler works with, and what it gives them to answer with."""

from __future__ import annotations

from collections.abc import Iterator

from kvmem.cache import CacheView, MemoryTokens, dynamic_cache
from kvmem.engines import Backend, Generation, Sampling, Token
from kvmem.engines.huggingface import HFBackend
from kvmem.engines.vllm import FileView, VLLMBackend
from kvmem.errors import ConfigError
from kvmem.prompt import Query

Engine = HFBackend | VLLMBackend
View = CacheView | FileView
"""What an engine answers with: tensors, or a file that it injects."""


def checked(backend: Backend) -> Engine:
    """Raises ConfigError for an engine that MemScheduler can't feed."""
    if isinstance(backend, VLLMBackend) or (isinstance(backend, HFBackend) and backend.ranks == 1):
        return backend
    if isinstance(backend, HFBackend):  # each rank would plan on its own
        raise ConfigError("MemScheduler works with a model on one device, and this one is divided. Use backend=vllm.")
    raise ConfigError(
        f"MemScheduler needs the backend huggingface, hf_graph or vllm, and has {backend.name}. A vLLM server looks "
        "after its memories itself: start it with --learn auto."
    )


def text_view(engine: Engine, tokens: MemoryTokens, namespace: str) -> View:
    """A view without KV for the prompt of these tokens, all of which is prefilled."""
    if isinstance(engine, VLLMBackend):
        return FileView(tokens.model_copy(update={"token_ids": ()}), None, None, namespace)
    return dynamic_cache.empty_view(tokens, engine.model_config)


def generate(engine: Engine, query: Query, view: View, max_new_tokens: int, sampling: Sampling | None) -> Generation:
    """The engine's answer with its own view. Raises ChangedFileError if what the view holds is damaged."""
    if isinstance(engine, VLLMBackend):
        return engine.generate(query, view, max_new_tokens, sampling)
    assert isinstance(view, CacheView)
    return engine.generate(query, view, max_new_tokens, sampling)


def stream(engine: Engine, query: Query, view: View, max_new_tokens: int, sampling: Sampling | None) -> Iterator[Token]:
    """As `generate`, token by token."""
    if isinstance(engine, VLLMBackend):
        return engine.stream(query, view, max_new_tokens, sampling)
    assert isinstance(view, CacheView)
    return engine.stream(query, view, max_new_tokens, sampling)
