"""vLLM in this process: memories are built and injected through our KV connector, and lie in files."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from kvmem.cache import KVCacheItem, Source, TextualMemoryItem, fingerprint_of
from kvmem.engines.base import BetweenLayers, FileHandle
from kvmem.engines.generation import Sampling, Token, as_text, check_asked
from kvmem.engines.vllm import benchmarking, launch
from kvmem.engines.vllm.benchmarking import MeasuredEngine
from kvmem.engines.vllm.config import Ask, VLLMConfig, VLLMGeneration
from kvmem.engines.vllm.connector import ITEM, LOAD, REPORT, SAVE
from kvmem.engines.vllm.launch import Request, described, dtype_of
from kvmem.engines.vllm.memory_files import FileStore, salt_of, split_behind
from kvmem.engines.vllm.open_loop import Arrival, ServingEngine
from kvmem.engines.vllm.pinning import PinningEngine, Pins
from kvmem.engines.vllm.requests import BUILD_TOKENS, announced, answer_of, not_saved, verified
from kvmem.errors import ArgumentError, ConfigError, EngineError, KVMemError, PromptError
from kvmem.merge import MergeStrategy, merged_tokens
from kvmem.models import loading
from kvmem.prompt import PromptTemplate, Query, TemplateKind, TokenizedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm import RequestOutput


class VLLMBackend(PinningEngine, ServingEngine, MeasuredEngine):
    """A vLLM engine with our KV connector. One batch at a time; calls from several threads wait for one another."""

    name: ClassVar[str] = VLLMConfig.backend
    config_class: ClassVar[type] = VLLMConfig

    def __init__(self, config: VLLMConfig, template: TemplateKind = "chat") -> None:
        launch.check_installed()
        self.config = config
        on_gpu = torch.cuda.is_available()
        self.dtype = dtype_of(config)
        loaded = described(config, self.dtype)
        self.own_weights = loaded.model.device.type == "meta"
        self.folder = loading.engine_folder(config.model_name_or_path, loaded)
        self.tokenizer = loaded.tokenizer
        self.template = PromptTemplate(loaded.tokenizer, template)
        self.fingerprint = fingerprint_of(loaded.model, loaded.tokenizer, loaded.origin)
        self.model_config = loaded.model.config
        self.device = torch.device("cpu")  # where loaded items lie; the engine takes them from files
        ends = loaded.model.generation_config.eos_token_id
        tokens = ends if isinstance(ends, list) else [ends]
        self.end_tokens = {token for token in [*tokens, self.tokenizer.eos_token_id] if token is not None}
        del loaded
        if on_gpu:
            torch.cuda.empty_cache()
        self.window = config.max_model_len or self.model_config.max_position_embeddings
        self.store = FileStore(Path(config.store_dir) if config.store_dir else None)
        self.llm = launch.start(
            config, self.folder, self.dtype, self.window, self.store.folder, self.fingerprint, self.own_weights
        )
        self.compute_device = torch.device("cuda" if on_gpu else "cpu")
        self.ranks = config.tensor_parallel_size
        self.attention = benchmarking.attention(self.llm)
        self.prefix_block_tokens = benchmarking.block_tokens(self.llm)
        self.pins = Pins()
        self.lock = threading.RLock()

    @classmethod
    def open(cls, config: VLLMConfig, template: TemplateKind = "chat") -> VLLMBackend:
        return cls(config, template)

    def build(
        self,
        source: Source,
        textual_memory: TextualMemoryItem | None = None,
        base: KVCacheItem | None = None,
        between_layers: BetweenLayers | None = None,
    ) -> KVCacheItem:
        self.check_builds_in_one_step(between_layers)
        tokens = self.template.memory_tokens(source)
        self._check_length(len(tokens.token_ids), BUILD_TOKENS)
        entry = announced(tokens, self.fingerprint, textual_memory)
        name = self.store.new_name()
        params: dict[str, str] = {SAVE: name, ITEM: entry.model_dump_json()}
        held = None if base is None else self.store.file_of(base)
        if held is not None:
            params[LOAD] = held.name
        started = time.perf_counter()
        # A salt of its own: the build is a real prefill, and not a hit on what an earlier one left in the engine.
        request = Request(uuid.uuid4().hex, tokens.token_ids, params, name, BUILD_TOKENS)
        with self.lock:
            (output,) = self._run([request])
        report = (output.kv_transfer_params or {})[REPORT]
        reason = not_saved(report, self.config.on_load_failure == "recompute")
        if reason:
            self.store.discard(name, self.config.tensor_parallel_size)
            raise EngineError(f"The memory was not saved: {reason}")
        item = self.store.adopt(name, self.fingerprint, self.model_config, self.config.tensor_parallel_size)
        item.metadata = item.metadata.model_copy(update={"build_s": time.perf_counter() - started})
        return item

    def view(self, items: Sequence[KVCacheItem], merge: MergeStrategy, separator: str) -> FileHandle:
        """One item's file; an exact merge as a joined prefix, which the engine then holds; any other merge as KV, built
        on the Hugging Face side."""
        if len(items) == 1:
            return self.store.view(items[0])
        separator_ids = self.template.separator_ids(separator)
        tokens = merged_tokens(items, separator_ids)
        self._check_length(len(tokens.token_ids), 1)
        if merge.exact:
            self.first_token(TokenizedPrompt((), tokens.token_ids))  # prefilled now, if the engine holds it no more
            return FileHandle(tokens, None)
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
        """An answer to `query` behind an injected memory, or behind nothing. Raises InjectionError where the memory was
        not what spared the engine its tokens."""
        (answer,) = self.generate_batch([Ask(query, kv_cache, max_new_tokens, sampling or Sampling(), cache_salt)])
        if isinstance(answer, KVMemError):
            raise answer
        return answer

    def generate_batch(self, asks: Sequence[Ask]) -> list[VLLMGeneration | KVMemError]:
        """Answers to requests that run together, in order; an error in place of each that failed, others unharmed."""
        results: dict[str, VLLMGeneration | KVMemError] = {}
        prompts: dict[str, TokenizedPrompt] = {}
        requests, ids = [], [uuid.uuid4().hex for _ in asks]
        for request_id, ask in zip(ids, asks, strict=True):
            try:
                prompt = self.split(ask.query, ask.kv_cache)
                requests.append(self._request(request_id, prompt, ask))
                prompts[request_id] = prompt
            except (PromptError, ConfigError, ArgumentError) as error:
                results[request_id] = error
        cache_view = {request_id: ask.kv_cache for request_id, ask in zip(ids, asks, strict=True)}
        with self.lock:
            for output in self._run(requests):
                results[output.request_id] = self._answer(
                    output, prompts[output.request_id], cache_view[output.request_id]
                )
        return [results[request_id] for request_id in ids]

    def stream(
        self,
        query: Query,
        kv_cache: FileHandle | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        cache_salt: str | None = None,
    ) -> Iterator[Token]:
        """The same answer as `generate`, token by token as it is made. The engine is this stream's until it ends."""
        prompt = self.split(query, kv_cache)
        ask = Ask(query, kv_cache, max_new_tokens, sampling or Sampling(), cache_salt)
        request = self._request(uuid.uuid4().hex, prompt, ask, stream=True)

        def token_ids() -> Iterator[int]:
            with self.lock:
                for output in self._run([request]):
                    yield from takewhile(lambda token: token not in self.end_tokens, output.outputs[0].token_ids)
                    if output.finished:
                        answer = self._answer(output, prompt, kv_cache)
                        if isinstance(answer, KVMemError):
                            raise answer

        return as_text(token_ids(), self._text, max_new_tokens)

    def answer_prompt(
        self,
        prompt: TokenizedPrompt,
        kv_cache: FileHandle | None = None,
        max_new_tokens: int = 1,
        cache_salt: str | None = None,
    ) -> VLLMGeneration:
        """Greedy tokens from token ids, past end tokens: what a measurement times. With one token, that is the TTFT."""
        return self._answer_prompt(prompt, kv_cache, max_new_tokens, cache_salt)[0]

    def _answer_prompt(
        self,
        prompt: TokenizedPrompt,
        kv_cache: FileHandle | None,
        max_new_tokens: int,
        cache_salt: str | None = None,
        top_logprobs: int | None = None,
    ) -> tuple[VLLMGeneration, RequestOutput]:
        ask = Ask("", kv_cache, max_new_tokens, cache_salt=cache_salt, past_end=True)
        request = self._request(uuid.uuid4().hex, prompt, ask, top_logprobs=top_logprobs)
        with self.lock:
            (output,) = self._run([request])
        answer = self._answer(output, prompt, kv_cache)
        if isinstance(answer, KVMemError):
            raise answer
        return answer, output

    def _request(
        self, request_id: str, prompt: TokenizedPrompt, ask: Ask, stream: bool = False, top_logprobs: int | None = None
    ) -> Request:
        check_asked(ask.max_new_tokens, ask.sampling)
        cache_view = ask.kv_cache
        room = self.window - len(prompt.ids)
        return Request(
            request_id,
            prompt.ids,
            {LOAD: cache_view.file.name} if cache_view and cache_view.file else {},
            salt_of(ask.cache_salt, cache_view),
            min(ask.max_new_tokens, room),
            ask.sampling,
            frozenset() if ask.past_end else frozenset(self.end_tokens),
            stream,
            top_logprobs,
        )

    def _arrived(self, request_id: str, arrival: Arrival) -> Request:
        ask = Ask("", arrival.kv_cache, arrival.new_tokens, cache_salt=arrival.cache_salt, past_end=True)
        return self._request(request_id, arrival.prompt, ask, stream=True)

    def _answer(
        self, output: RequestOutput, prompt: TokenizedPrompt, cache_view: FileHandle | None
    ) -> VLLMGeneration | KVMemError:
        may_recompute = self.config.on_load_failure == "recompute"
        return verified(answer_of(output), prompt, cache_view, may_recompute, self.end_tokens, self._text)

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    @cached_property
    def _merge_model(self) -> PreTrainedModel:
        """The same weights in transformers, on the CPU, for merges that are not a prefix; loaded at first need."""
        if self.own_weights:
            raise ConfigError(
                "This merge needs the weights in transformers too, and the engine made its own. "
                "Use random_weights='saved', or merge=Reprefill."
            )
        return loading.load(self.folder, torch.device("cpu"), self.dtype).model
