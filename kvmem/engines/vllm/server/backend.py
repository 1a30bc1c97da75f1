"""A vLLM server over OpenAI's HTTP API: memories are files that its connector injects, or prefixes in its own cache."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvmem.cache import KVCacheItem, Source, TextualMemoryItem, dynamic_cache
from kvmem.engines.base import Backend, BetweenLayers, FileHandle
from kvmem.engines.generation import Sampling, Token, as_text, check_asked
from kvmem.engines.vllm.config import Ask, VLLMGeneration
from kvmem.engines.vllm.connector import ITEM, LOAD, REPORT_TO, SAVE, report_name
from kvmem.engines.vllm.memory_files import FileStore, salt_of, split_behind
from kvmem.engines.vllm.requests import BUILD_TOKENS, EngineAnswer, announced, not_saved, verified
from kvmem.engines.vllm.server.card import ServerCard, of_a_served_model
from kvmem.engines.vllm.server.client import START, Chunk, ServerClient, ServerRequest, check_tokens_and_counts
from kvmem.engines.vllm.server.config import StreamTTFT, VLLMServerConfig
from kvmem.engines.vllm.server.prefixes import Prefixes
from kvmem.errors import EngineError, KVMemError, MergeError, PromptError, ServerError
from kvmem.merge import MergeStrategy, merged_tokens
from kvmem.models import loading
from kvmem.prompt import PromptTemplate, Query, TemplateKind, TokenizedPrompt


class VLLMServerBackend(Backend):
    """A model on a vLLM server, tokenised here. Safe to use from several threads."""

    name: ClassVar[str] = VLLMServerConfig.backend
    config_class: ClassVar[type] = VLLMServerConfig

    def __init__(self, config: VLLMServerConfig, template: TemplateKind = "chat") -> None:
        self.config = config
        self.client = ServerClient(config)
        self.window = self.client.window()
        store = Path(config.store_dir) if config.store_dir else None
        self.card = ServerCard.read(store) if store else None
        self.store = FileStore(shared=store) if store else None
        self.tokenizer = loading.load_tokenizer(
            config.tokenizer_name_or_path or (self.card.model if self.card else config.model)
        )
        self.template = PromptTemplate(self.tokenizer, template)
        if self.card:
            self.card.check_tokenizer(self.tokenizer)
            self.fingerprint, self.model_config = self.card.fingerprint, self.card.pretrained_config()
        else:
            self.fingerprint = of_a_served_model(self.client.name, config.model, self.tokenizer)
            self.model_config = PreTrainedConfig(num_hidden_layers=0)  # type: ignore[call-arg]
        self.device = torch.device("cpu")
        self.prefixes = Prefixes(self.client)
        check_tokens_and_counts(self.client, self.tokenizer, self.window)

    @classmethod
    def open(cls, config: VLLMServerConfig, template: TemplateKind = "chat") -> VLLMServerBackend:
        return cls(config, template)

    def build(
        self,
        source: Source,
        textual_memory: TextualMemoryItem | None = None,
        base: KVCacheItem | None = None,
        between_layers: BetweenLayers | None = None,
    ) -> KVCacheItem:
        """A file that the server's connector writes; without a store a prefix on the server, whose tensors are not to
        be had (`build_s` is then a hit's time where the server held it already)."""
        self.check_builds_in_one_step(between_layers)
        tokens = self.template.memory_tokens(source)
        self._check_length(len(tokens.token_ids), BUILD_TOKENS)
        entry = announced(tokens, self.fingerprint, textual_memory)
        started = time.perf_counter()
        if self.store is None or self.card is None:
            build_s = self.prefixes.warm_up(tokens.token_ids, self.config.cache_salt)
            metadata = entry.metadata.model_copy(update={"build_s": build_s})
            return KVCacheItem(dynamic_cache.from_layers([], self.model_config, 0), metadata, entry.kv_cache_id)
        name = self.store.new_name()
        transfer = {SAVE: name, ITEM: entry.model_dump_json()}
        held = None if base is None else self.store.file_of(base)
        if held is not None:
            transfer[LOAD] = held.name
        # A salt of its own: the build is a real prefill, and not a hit on what an earlier one left on the server.
        answer = self.client.complete(ServerRequest(tokens.token_ids, BUILD_TOKENS, Sampling(), name, transfer, True))
        if answer.report is None:
            raise ServerError(f"{self.client.name} does not run kvmem's connector. Start it by {START} --store FOLDER.")
        reason = not_saved(answer.report, self._may_recompute)
        if reason:
            self.store.discard(name, self.card.ranks)
            raise EngineError(f"The memory was not saved: {reason}")
        item = self.store.adopt(name, self.fingerprint, self.model_config, self.card.ranks)
        item.metadata = item.metadata.model_copy(update={"build_s": time.perf_counter() - started})
        return item

    def warm_up(self, memory: KVCacheItem | FileHandle | Source, cache_salt: str | None = None) -> int:
        """Prefills a memory into the server's own prefix cache, for one tenant; how many tokens (whole blocks) that
        spares each later request there, by the server's own count. Needed again after an eviction or a restart."""
        if isinstance(memory, KVCacheItem):
            tokens = memory.metadata.tokens
        else:
            tokens = memory.tokens if isinstance(memory, FileHandle) else self.template.memory_tokens(memory)
        self._check_length(len(tokens.token_ids), 1)
        salt = cache_salt or self.config.cache_salt
        self.prefixes.warm_up(tokens.token_ids, salt)
        return self.prefixes.held[tokens.token_ids, salt]

    def view(self, items: Sequence[KVCacheItem], merge: MergeStrategy, separator: str) -> FileHandle:
        """One item's file or prefix; an exact merge as a joined prefix, which the server then holds; any other as KV,
        built on this machine."""
        if len(items) == 1:
            return self.store.view(items[0]) if self.store else FileHandle(items[0].metadata.tokens, None)
        separator_ids = self.template.separator_ids(separator)
        tokens = merged_tokens(items, separator_ids)
        self._check_length(len(tokens.token_ids), 1)
        if merge.exact:
            self.prefixes.warm_up(tokens.token_ids, self.config.cache_salt)
            return FileHandle(tokens, None)
        if self.store is None:
            raise MergeError(
                f"{merge.name} needs tensors; item {items[0].kv_cache_id} is a prefix on a server. Use merge=Reprefill."
            )
        return self.store.view_merged(items, tokens, separator_ids, merge, self._merge_model)

    def split(self, query: Query, kv_cache: FileHandle | None = None) -> TokenizedPrompt:
        """The prompt of `query`, split at what `kv_cache` holds of it; PromptError if it is longer than the window."""
        prompt = split_behind(self.template, query, kv_cache)
        self._check_length(len(prompt.ids), 1)
        return prompt

    def generate(
        self,
        query: Query,
        kv_cache: FileHandle | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        cache_salt: str | None = None,
    ) -> VLLMGeneration:
        """An answer to `query` behind a memory, or behind nothing. Raises InjectionError where the memory was not what
        spared the server its tokens."""
        ask = Ask(query, kv_cache, max_new_tokens, sampling or Sampling(), cache_salt)
        return self._answer(self.split(query, kv_cache), ask)

    def generate_batch(self, asks: Sequence[Ask]) -> list[VLLMGeneration | KVMemError]:
        """Answers to requests that run together, in order; an error in place of each that failed, others unharmed."""

        def answer(ask: Ask) -> VLLMGeneration | KVMemError:
            try:
                return self._answer(self.split(ask.query, ask.kv_cache), ask)
            except KVMemError as error:
                return error

        with ThreadPoolExecutor(self.config.parallel_requests) as threads:
            return list(threads.map(answer, asks))

    def answer_prompt(
        self,
        prompt: TokenizedPrompt,
        kv_cache: FileHandle | None = None,
        max_new_tokens: int = 1,
        cache_salt: str | None = None,
    ) -> VLLMGeneration:
        """Greedy tokens from token ids, past end tokens."""
        return self._answer(prompt, Ask("", kv_cache, max_new_tokens, cache_salt=cache_salt), past_end=True)

    def stream(
        self,
        query: Query,
        kv_cache: FileHandle | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        cache_salt: str | None = None,
    ) -> Iterator[Token]:
        """The same answer as `generate`, token by token as it is made, and verified at its end."""
        prompt = self.split(query, kv_cache)
        ask = Ask(query, kv_cache, max_new_tokens, sampling or Sampling(), cache_salt)
        request = self._request(prompt, ask, stream=True)

        def token_ids() -> Iterator[int]:
            chunks = []
            for chunk in self.client.stream(request):
                chunks.append(chunk)
                ended = chunk.finish_reason == "stop"
                yield from chunk.token_ids[: len(chunk.token_ids) - ended]
            self._verified(self._joined(chunks, request), prompt, ask)

        return as_text(token_ids(), self._text, max_new_tokens)

    def ttft(
        self,
        prompt: TokenizedPrompt,
        kv_cache: FileHandle | None = None,
        max_new_tokens: int = 4,
        cache_salt: str | None = None,
    ) -> StreamTTFT:
        """Times of a streamed greedy answer past end tokens: to the first chunk, and to the first text that is any."""
        ask = Ask("", kv_cache, max_new_tokens, cache_salt=cache_salt)
        request = self._request(prompt, ask, past_end=True, stream=True)
        chunks = list(self.client.stream(request))
        generation = self._verified(self._joined(chunks, request), prompt, ask)
        first_text_s = next((chunk.at_s for chunk in chunks if chunk.text), None)
        return StreamTTFT(chunks[0].at_s, first_text_s, chunks[-1].at_s, generation)

    def _request(
        self, prompt: TokenizedPrompt, ask: Ask, past_end: bool = False, stream: bool = False
    ) -> ServerRequest:
        check_asked(ask.max_new_tokens, ask.sampling)
        cache_view, transfer = ask.kv_cache, {}
        if cache_view and cache_view.file:
            transfer[LOAD] = cache_view.file.name
            if stream:  # whose pieces do not carry the connector's report
                transfer[REPORT_TO] = str(uuid.uuid4())
        elif cache_view and not self._may_recompute:
            self.prefixes.check_warm(cache_view, self._tenant(ask))
        new_tokens = min(ask.max_new_tokens, self.window - len(prompt.ids))
        salt = salt_of(self._tenant(ask), cache_view)
        return ServerRequest(prompt.ids, new_tokens, ask.sampling, salt, transfer, past_end)

    def _answer(self, prompt: TokenizedPrompt, ask: Ask, past_end: bool = False) -> VLLMGeneration:
        return self._verified(self.client.complete(self._request(prompt, ask, past_end)), prompt, ask)

    def _joined(self, chunks: Sequence[Chunk], request: ServerRequest) -> EngineAnswer:
        asked = request.transfer.get(REPORT_TO)
        return self.client.joined(chunks, self.store.folder / report_name(asked) if self.store and asked else None)

    def _verified(self, answer: EngineAnswer, prompt: TokenizedPrompt, ask: Ask) -> VLLMGeneration:
        ends = answer.token_ids[-1:]  # where the server says that it stopped, at an end token
        result = verified(answer, prompt, ask.kv_cache, self._may_recompute, ends, self._text)
        if isinstance(result, KVMemError):
            raise result
        return self.prefixes.verified(result, prompt, ask.kv_cache, self._tenant(ask), self._may_recompute)

    def _tenant(self, ask: Ask) -> str | None:
        return ask.cache_salt or self.config.cache_salt

    @property
    def _may_recompute(self) -> bool:
        return self.config.on_miss == "recompute"

    @cached_property
    def _merge_model(self) -> PreTrainedModel:
        """The same weights in transformers, for merges that are not a prefix; loaded at first need."""
        assert self.card is not None
        dtype: torch.dtype = getattr(torch, self.fingerprint.dtype)
        return loading.load(self.card.model, self.device, dtype).model

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _check_length(self, tokens: int, room: int) -> None:
        if tokens + room > self.window:
            raise PromptError(
                f"A text of {tokens} tokens, and {room} to generate, do not fit the window of {self.window} tokens of "
                f"{self.client.name}. Shorten it, split it into memories, or start the server with a larger "
                "--max-model-len."
            )
