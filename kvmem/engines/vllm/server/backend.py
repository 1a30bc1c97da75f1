"""A client of a vLLM server, over OpenAI's HTTP API.

With a store, memories are files that the server's connector injects. Without one, they are prefixes in the server's
own cache.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from kvmem.cache import KVCacheItem, Source
from kvmem.engines.base import FileHandle, Injectable
from kvmem.engines.vllm.connector import LEASE, LOAD, REPORT_TO, SAVE, SAVE_KEY, namespace_of, report_name, save_key
from kvmem.engines.vllm.file_injection import FileInjectingEngine
from kvmem.engines.vllm.memory_files import FileStore, as_file_handle, tenant_of
from kvmem.engines.vllm.requests import EngineAnswer, EngineRequest, GenerationRequest, VLLMGeneration, without_end
from kvmem.engines.vllm.server.card import ServerCard, fingerprint_of_served_model
from kvmem.engines.vllm.server.client import START, Chunk, ServerClient, check_tokens_and_counts
from kvmem.engines.vllm.server.config import VLLMServerConfig
from kvmem.engines.vllm.server.prefixes import Prefixes
from kvmem.errors import ConfigError, KVMemError, ServerError
from kvmem.models import loading
from kvmem.prompt import PromptTemplate, TemplateKind, TokenizedPrompt


@dataclass(frozen=True)
class StreamTTFT:
    """The times of a streamed answer, in seconds, from the moment its token ids are ready to be sent; with HTTP."""

    first_chunk_s: float
    """Until the server's first chunk, which holds the first token, with or without text."""
    first_text_s: float | None
    """Until the first chunk with non-empty text, which is what a reader sees. None: no token had text."""
    whole_s: float
    """Until the end of the answer."""
    generation: VLLMGeneration


class VLLMServerBackend(FileInjectingEngine):
    """A model on a vLLM server. Prompts are tokenized here. Safe to use from several threads."""

    name: ClassVar[str] = VLLMServerConfig.backend
    config_class: ClassVar[type] = VLLMServerConfig

    def __init__(
        self,
        config: VLLMServerConfig,
        template: TemplateKind = "chat",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.client = ServerClient(config)
        self.default_salt = config.cache_salt
        self.window = self.client.window()
        self.window_label = f"the window of {self.window} tokens of {self.client.name}"
        self.larger_window = "start the server with a larger --max-model-len"
        folder = Path(config.store_dir) if config.store_dir else None
        card = ServerCard.read(folder) if folder else None
        self.store = None
        if folder and card:
            self.store = FileStore(None, folder, card.orphans_after_s, namespace_of(config.cache_salt))
        self.model_name = card.model if card else config.model
        self.tokenizer = loading.load_tokenizer(config.tokenizer_name_or_path or self.model_name)
        self.template = PromptTemplate(self.tokenizer, template, chat_template_kwargs)
        if card:
            card.check_tokenizer(self.tokenizer)
            self.ranks = card.ranks
            self.fingerprint, self.model_config = card.fingerprint, card.pretrained_config()
            if self.template.identity() != self.fingerprint.template:
                raise ConfigError(
                    f"These chat_template_kwargs change what stands before a memory, and the connector of "
                    f"{self.client.name} takes files without them. Leave store_dir out, or use backend=vllm."
                )
        else:
            self.ranks = 1
            served = fingerprint_of_served_model(self.client.name, config.model, self.tokenizer)
            self.fingerprint = served.model_copy(update={"template": self.template.identity()})
            self.model_config = PreTrainedConfig.from_dict({"num_hidden_layers": 0})
        self.device = torch.device("cpu")
        self.prefixes = Prefixes(self.client)
        check_tokens_and_counts(self.client, self.tokenizer, self.window)

    @classmethod
    def open(
        cls,
        config: VLLMServerConfig,
        template: TemplateKind = "chat",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> VLLMServerBackend:
        return cls(config, template, chat_template_kwargs)

    @property
    def may_recompute(self) -> bool:
        return self.config.on_miss == "recompute"

    @property
    def weights(self) -> str:
        return self.model_name

    def submit(self, request: EngineRequest) -> EngineAnswer:
        answer = self.client.complete(request)
        if SAVE in request.transfer and answer.report is None:
            raise ServerError(f"{self.client.name} does not run kvmem's connector. Start it by {START} --store FOLDER.")
        return answer

    def submit_batch(self, requests: Sequence[EngineRequest]) -> list[EngineAnswer | KVMemError]:
        """Sends at most `parallel_requests` of them at once."""

        def submitted(request: EngineRequest) -> EngineAnswer | KVMemError:
            try:
                return self.submit(request)
            except KVMemError as error:
                return error

        with ThreadPoolExecutor(self.config.parallel_requests) as threads:
            return list(threads.map(submitted, requests))

    def submit_stream(self, request: EngineRequest) -> Generator[int, None, EngineAnswer]:
        chunks = []
        request, report_path = self._with_report(request)
        for chunk in self.client.stream(request):
            chunks.append(chunk)
            yield from without_end(chunk.token_ids, chunk.finish_reason)
        return self.client.joined(chunks, report_path)

    def save_order(self) -> dict[str, Any]:
        order = super().save_order()
        if self.store is not None:
            order[SAVE_KEY] = save_key(self.store.folder)
            if self.store.lease is not None:
                order[LEASE] = self.store.lease.client
        return order

    def hold_prefix(self, token_ids: tuple[int, ...], cache_salt: str | None) -> float:
        return self.prefixes.warm_up(token_ids, cache_salt)

    def warm_up(self, memory: KVCacheItem | FileHandle | Source, cache_salt: str | None = None) -> int:
        """Prefills a memory into the server's own prefix cache, for one tenant. Repeat it after an eviction or restart.

        Returns how many tokens (whole blocks) this spares each later request, by the server's own count.
        """
        namespace = ""
        if isinstance(memory, KVCacheItem):
            tokens, namespace = memory.metadata.tokens, memory.metadata.namespace
        else:
            namespace = memory.namespace if isinstance(memory, FileHandle) else ""
            tokens = memory.tokens if isinstance(memory, FileHandle) else self.template.memory_tokens(memory)
        self.check_length(len(tokens.token_ids), 1)
        salt = tenant_of(cache_salt, FileHandle(tokens, None, namespace=namespace), self.default_salt)
        self.prefixes.warm_up(tokens.token_ids, salt)
        return self.prefixes.held[tokens.token_ids, salt]

    def ttft(
        self,
        prompt: TokenizedPrompt,
        kv_cache: Injectable | None = None,
        max_new_tokens: int = 4,
        cache_salt: str | None = None,
    ) -> StreamTTFT:
        """The times of a streamed greedy answer, which continues past end tokens."""
        request = GenerationRequest(prompt, kv_cache, max_new_tokens, cache_salt=cache_salt, past_end=True)
        engine_request, report_path = self._with_report(self.engine_request(prompt, request))
        chunks: list[Chunk] = list(self.client.stream(engine_request))
        generation = self.verify(self.client.joined(chunks, report_path), prompt, request)
        first_text_s = next((chunk.at_s for chunk in chunks if chunk.text), None)
        return StreamTTFT(chunks[0].at_s, first_text_s, chunks[-1].at_s, generation)

    def engine_request(self, prompt: TokenizedPrompt, request: GenerationRequest) -> EngineRequest:
        """Raises InjectionError for a prefix that was not warmed up for this tenant, unless it may be computed."""
        cache_view = as_file_handle(request.kv_cache)
        if cache_view and cache_view.file is None and not self.may_recompute:
            self.prefixes.check_warm(cache_view, tenant_of(request.cache_salt, cache_view, self.default_salt))
        return super().engine_request(prompt, request)

    def verify(self, answer: EngineAnswer, prompt: TokenizedPrompt, request: GenerationRequest) -> VLLMGeneration:
        cache_view = as_file_handle(request.kv_cache)
        salt = tenant_of(request.cache_salt, cache_view, self.default_salt)
        generation = super().verify(answer, prompt, request)
        return self.prefixes.verified(generation, prompt, cache_view, salt, self.may_recompute)

    def _with_report(self, request: EngineRequest) -> tuple[EngineRequest, Path | None]:
        """A request to stream whose connector report is written to the returned file, as streams do not carry it."""
        if self.store is None or LOAD not in request.transfer:
            return request, None
        name = str(uuid.uuid4())
        return replace(request, transfer={**request.transfer, REPORT_TO: name}), self.store.folder / report_name(name)
