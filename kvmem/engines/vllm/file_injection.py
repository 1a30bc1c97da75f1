"""What all vLLM engines share: memories are files that kvmem's connector writes and injects.

`FileInjectingEngine` builds memories, hands out views of them and generates. How a request reaches the engine is left
to its subclasses: `VLLMBackend` runs the engine in this process, `VLLMServerBackend` is a client of a server.
"""

from __future__ import annotations

import statistics
import time
import uuid
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kvmem.cache import (
    KVCacheItem,
    KVCacheMetadata,
    MemoryTokens,
    ModelFingerprint,
    Source,
    TextualMemoryItem,
    TextualSource,
    dynamic_cache,
)
from kvmem.engines.base import Backend, BetweenLayers, FileHandle, Injectable
from kvmem.engines.generation import Sampling, Token, as_text, check_generation
from kvmem.engines.vllm.connector import ITEM, LOAD, PREFETCH, SAVE, HostCacheState, Report
from kvmem.engines.vllm.file_view import FileView
from kvmem.engines.vllm.memory_files import FileStore, as_file_handle, block_salt, salt_within, split_behind, tenant_of
from kvmem.engines.vllm.requests import EngineAnswer, EngineRequest, GenerationRequest, VLLMGeneration, verified
from kvmem.errors import ChangedFileError, EngineError, InjectionError, KVMemError, MergeError, PromptError
from kvmem.merge import MergeStrategy, merged_tokens
from kvmem.models import loading
from kvmem.prompt import Query, TokenizedPrompt
from kvmem.storage import ItemManifest

BUILD_TOKENS = 2
"""A build generates two tokens, because a failed save is reported one step after the prompt's last."""
PREFILL_SAMPLES = 3
PREFILL_FIRST_ID, PREFILL_IDS = 10, 1000
"""Token ids of a measured prefill: any will do, as a prefill's time does not depend on them."""


class FileInjectingEngine(Backend):
    """An engine that saves memories to files and injects them from there, and verifies every hit by its counts."""

    tokenizer: PreTrainedTokenizerBase
    store: FileStore | None
    """The folder of memory files. None: the engine keeps memories as prefixes in its own cache, without tensors."""
    ranks: int
    """Tensor-parallel ranks, each of which saves its own heads."""
    window: int
    """The most tokens of prompt and answer together."""
    window_label: str
    """The window as an error message names it."""
    larger_window: str
    """How to get a larger window, as an error message says it."""
    default_salt: str | None = None
    """Salt of requests that give no `cache_salt`."""
    keeps_last_position = False
    """A file can be cut at any token."""
    answers_together = False

    @abstractmethod
    def submit(self, request: EngineRequest) -> EngineAnswer:
        """Sends one request and waits for its answer."""

    def submit_behind(self, request: EngineRequest) -> EngineAnswer:
        """As `submit`, while requests of other threads go on."""
        return self.submit(request)

    @abstractmethod
    def submit_batch(self, requests: Sequence[EngineRequest]) -> list[EngineAnswer | KVMemError]:
        """Sends requests that run together. Returns an answer or an error for each, in order."""

    @abstractmethod
    def submit_stream(self, request: EngineRequest) -> Generator[int, None, EngineAnswer]:
        """Yields each token as it is generated, except the end token, and returns the whole answer. Closing the
        generator aborts the request."""

    @abstractmethod
    def hold_prefix(self, token_ids: tuple[int, ...], cache_salt: str | None) -> float:
        """Prefills token ids into the engine's own prefix cache, for requests of this salt. Returns the seconds that
        this took."""

    @property
    @abstractmethod
    def may_recompute(self) -> bool:
        """True: tokens of a memory that can't be reused are computed and counted as recomputed. False: they are an
        InjectionError."""

    @property
    @abstractmethod
    def weights(self) -> str:
        """Folder or hub name of the engine's weights. Raises ConfigError if they can't be loaded outside it."""

    def build(
        self,
        source: Source,
        textual_memory: TextualMemoryItem | None = None,
        base: KVCacheItem | None = None,
        between_layers: BetweenLayers | None = None,
        namespace: str = "",
    ) -> KVCacheItem:
        """Prefills `source` into a new item, whose file the connector writes; with `base`, only the tokens behind it.

        between_layers: called once, before the build is sent: vLLM's own scheduler interleaves it with other requests.

        Without a store the item is a prefix in the engine's own cache and has no tensors. Its `build_s` is the time of
        a hit if the engine held the prefix already.

        Raises PromptError if the text does not fit the window, and EngineError if the file was not saved.
        """
        tokens = self.template.memory_tokens(source)
        return self.build_tokens(tokens, textual_memory, base, between_layers, namespace)

    def build_tokens(
        self,
        tokens: MemoryTokens,
        textual_memory: TextualMemoryItem | None = None,
        base: KVCacheItem | None = None,
        between_layers: BetweenLayers | None = None,
        namespace: str = "",
    ) -> KVCacheItem:
        """As `build`, for tokens that are already known, such as those of several texts joined."""
        self.check_length(len(tokens.token_ids), BUILD_TOKENS)
        manifest = new_manifest(tokens, self.fingerprint, textual_memory, namespace)
        if between_layers is not None:
            between_layers()
        store = self.store
        if store is None:
            build_s = self.hold_prefix(tokens.token_ids, namespace or self.default_salt)
            metadata = manifest.metadata.model_copy(update={"build_s": build_s})
            return KVCacheItem(dynamic_cache.from_layers([], self.model_config, 0), metadata, manifest.kv_cache_id)
        transfer = self.save_order() | {ITEM: manifest.model_dump_json()}
        base_file = None if base is None else store.file_of(base)
        if base_file is not None:
            transfer[LOAD] = base_file.name
        started = time.perf_counter()
        # A salt of its own: the build is a real prefill, not a hit on what an earlier one left in the engine.
        salt = salt_within(namespace or self.default_salt, uuid.uuid4().hex)
        request = EngineRequest(tokens.token_ids, BUILD_TOKENS, salt=salt, transfer=transfer, past_end=True)
        name, reason = self._saved(self.submit(request) if between_layers is None else self.submit_behind(request))
        if reason:
            if name:
                (store.folder / name).unlink(missing_ok=True)
            raise EngineError(f"The memory was not saved: {reason}")
        item = store.adopt(name, self.fingerprint, self.model_config, self.ranks)
        item.metadata = item.metadata.model_copy(update={"build_s": time.perf_counter() - started})
        return item

    @property
    def build_writes_file(self) -> bool:
        return self.store is not None

    def save_order(self) -> dict[str, Any]:
        """What a request says to have its prompt saved, besides the manifest."""
        return {SAVE: True}

    def _saved(self, answer: EngineAnswer) -> tuple[str, str]:
        """The name of the file that was saved, "" if none was, and why the item can't be used, "" if it can."""
        report = answer.report
        if report is None:
            return "", "The engine does not run kvmem's connector."
        reason = report.save_error or ("" if self.may_recompute else report.load_error)
        return report.saved, reason or ("" if report.saved else "The engine's kvmem is older. Use the same version.")

    @property
    def max_tokens(self) -> int:
        return self.window

    def measure_prefill(self, lengths: Sequence[int]) -> list[float]:
        """Seconds of a cold prefill of each number of tokens: warmed up, the median of three.

        A salt of its own keeps each prefill from the blocks of the one before. On a server the times contain HTTP.
        Raises PromptError for a length that does not fit the window.
        """
        medians = []
        for tokens in lengths:
            self.check_length(tokens, 1)
            prompt = TokenizedPrompt((), tuple(PREFILL_FIRST_ID + i % PREFILL_IDS for i in range(tokens)))
            samples = []
            for _ in range(1 + PREFILL_SAMPLES):
                started = time.perf_counter()
                self.answer_prompt(prompt, cache_salt=uuid.uuid4().hex)
                samples.append(time.perf_counter() - started)
            medians.append(statistics.median(samples[1:]))
        return medians

    def view(self, items: Sequence[KVCacheItem], merge: MergeStrategy, separator: str) -> FileHandle:
        """The file of one item. Several items become a joined prefix in the engine's own cache if the merge is exact;
        otherwise a new file, which transformers computes on this machine.

        Raises MergeError for a merge that needs tensors if the engine has no store.
        """
        if len(items) == 1:
            if self.store is not None:
                return self.store.view(items[0])
            return FileHandle(items[0].metadata.tokens, None, namespace=items[0].metadata.namespace)
        separator_ids = self.template.separator_ids(separator)
        tokens = merged_tokens(items, separator_ids)
        self.check_length(len(tokens.token_ids), 1)
        if merge.exact:
            namespace = items[0].metadata.namespace
            self.hold_prefix(tokens.token_ids, namespace or self.default_salt)
            return FileHandle(tokens, None, namespace=namespace)
        if self.store is None:
            raise MergeError(
                f"{merge.name} needs tensors; item {items[0].kv_cache_id} is a prefix on a server. Use merge=Reprefill."
            )
        return self.store.view_merged(items, tokens, separator_ids, merge, self.merge_model)

    @cached_property
    def merge_model(self) -> PreTrainedModel:
        """The engine's weights in transformers, for merges that need tensors; loaded at first use."""
        dtype: torch.dtype = getattr(torch, self.fingerprint.dtype)
        return loading.load(self.weights, self.device, dtype).model

    def prefetch(self, memories: Sequence[KVCacheItem | FileHandle], cache_salt: str | None = None) -> int:
        """Has the files of these memories read into host memory, before requests need them.

        It returns while they are read; a request that comes earlier waits for the same read. All memories are of one
        namespace, or of the namespace of `cache_salt`. Returns how many of them host memory holds together.
        Joined prefixes, which have no file, are left out.
        Raises InjectionError if a file can't be found, and EngineError if the engine has no store.
        """
        store = self.store
        if store is None:
            raise EngineError("Without a store, memories are prefixes in the engine's own cache. Use warm_up.")
        views = [store.view(memory) if isinstance(memory, KVCacheItem) else memory for memory in memories]
        names = [cache_view.file.name for cache_view in views if cache_view.file is not None]
        salt = cache_salt or next((cache_view.namespace for cache_view in views if cache_view.namespace), None)
        report = self._prefetch(names, salt or self.default_salt)
        if report.prefetch_error:
            raise InjectionError(f"A memory is not prefetched: {report.prefetch_error}")
        return report.prefetched

    def host_cache(self) -> HostCacheState:
        """What the engine's host memory holds of memory files, and counts since its start."""
        return HostCacheState(**self._prefetch([], self.default_salt).host_cache)

    def _prefetch(self, names: Sequence[str], salt: str | None) -> Report:
        # A request of one token carries the order, with a salt that no other request has.
        request = EngineRequest((0,), 1, salt=salt_within(salt, uuid.uuid4().hex), past_end=True)
        report = self.submit(replace(request, transfer={PREFETCH: list(names)})).report
        if report is None:
            raise EngineError("The engine does not run kvmem's connector.")
        return report

    def split(self, query: Query, kv_cache: Injectable | None = None) -> TokenizedPrompt:
        """The prompt of `query`, split at the tokens that `kv_cache` holds of it.

        Raises PromptError if it is longer than the window.
        """
        prompt = split_behind(self.template, query, kv_cache)
        self.check_length(len(prompt.ids), 1)
        return prompt

    def generate(
        self,
        query: Query,
        kv_cache: Injectable | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        cache_salt: str | None = None,
    ) -> VLLMGeneration:
        """The answer to `query` behind an injected memory, or with no memory.

        Raises InjectionError if the engine computed tokens of the memory that it should have reused.
        """
        request = GenerationRequest(query, kv_cache, max_new_tokens, sampling or Sampling(), cache_salt)
        prompt = self.split(query, kv_cache)
        if isinstance(kv_cache, FileView):
            return self._answer_of_view(prompt, request, kv_cache)
        return self.answer(prompt, request)

    def _answer_of_view(self, prompt: TokenizedPrompt, request: GenerationRequest, view: FileView) -> VLLMGeneration:
        """The answer to a scheduler's view, which hears of it."""
        stream = self._timed_stream(self.engine_request(prompt, request), time.perf_counter())
        while True:
            try:
                next(stream)
            except StopIteration as end:
                answer, first_s = end.value
                break
        return replace(self._verified_view(answer, prompt, request, view, first_s), note=view.note, lossy=view.lossy)

    def _verified_view(
        self, answer: EngineAnswer, prompt: TokenizedPrompt, request: GenerationRequest, view: FileView, first_s: float
    ) -> VLLMGeneration:
        """As `verify`, for a scheduler's view, which hears of the answer. Raises ChangedFileError if its file was not
        injected."""
        try:
            generation = self.verify(answer, prompt, request)
        except InjectionError as error:
            raise ChangedFileError(str(error)) from error
        if view.on_prefill is not None:
            view.on_prefill(len(prompt.ids) - generation.cached_tokens, generation.cached_tokens, first_s)
        return generation

    def _timed_stream(self, request: EngineRequest, started: float) -> Generator[int, None, tuple[EngineAnswer, float]]:
        """As `submit_stream`. Returns also the seconds from `started` to the first token."""
        first_s, stream = 0.0, self.submit_stream(request)
        while True:
            try:
                token = next(stream)
            except StopIteration as end:
                return end.value, first_s or time.perf_counter() - started
            first_s = first_s or time.perf_counter() - started
            yield token

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[VLLMGeneration | KVMemError]:
        """Answers to requests that run together, in order. A request that fails gives its error; the others go on."""
        results: list[VLLMGeneration | KVMemError | None] = [None] * len(requests)
        prepared: list[tuple[int, TokenizedPrompt, EngineRequest]] = []
        for number, request in enumerate(requests):
            try:
                query = request.query
                prompt = query if isinstance(query, TokenizedPrompt) else self.split(query, request.kv_cache)
                prepared.append((number, prompt, self.engine_request(prompt, request)))
            except KVMemError as error:
                results[number] = error
        answers = self.submit_batch([engine_request for _, _, engine_request in prepared])
        for (number, prompt, _), answer in zip(prepared, answers, strict=True):
            results[number] = self.result(answer, prompt, requests[number])
        return [result for result in results if result is not None]

    def stream(
        self,
        query: Query,
        kv_cache: Injectable | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        cache_salt: str | None = None,
    ) -> Iterator[Token]:
        """The same answer as `generate`, token by token as it is generated, and verified at its end."""
        prompt = self.split(query, kv_cache)
        request = GenerationRequest(query, kv_cache, max_new_tokens, sampling or Sampling(), cache_salt)
        engine_request = self.engine_request(prompt, request)

        def token_ids() -> Iterator[int]:
            started = time.perf_counter()
            answer, first_s = yield from self._timed_stream(engine_request, started)
            if isinstance(kv_cache, FileView):
                self._verified_view(answer, prompt, request, kv_cache, first_s)
            else:
                self.verify(answer, prompt, request)

        return as_text(token_ids(), self.text, engine_request.max_new_tokens, max_new_tokens)

    def answer_prompt(
        self,
        prompt: TokenizedPrompt,
        kv_cache: Injectable | None = None,
        max_new_tokens: int = 1,
        cache_salt: str | None = None,
    ) -> VLLMGeneration:
        """Greedy tokens from token ids, past end tokens: what a measurement times. With one token, that is the TTFT."""
        request = GenerationRequest(prompt, kv_cache, max_new_tokens, cache_salt=cache_salt, past_end=True)
        return self.answer(prompt, request)

    def answer(self, prompt: TokenizedPrompt, request: GenerationRequest) -> VLLMGeneration:
        """The verified answer to a prompt that is split already."""
        return self.verify(self.submit(self.engine_request(prompt, request)), prompt, request)

    def engine_request(self, prompt: TokenizedPrompt, request: GenerationRequest) -> EngineRequest:
        """What is sent to the engine for `request`, whose prompt is `prompt`.

        Raises NamespaceError if the request's cache_salt is of another namespace than its memory.
        """
        check_generation(request.max_new_tokens, request.sampling)
        cache_view = as_file_handle(request.kv_cache)
        return EngineRequest(
            prompt.ids,
            min(request.max_new_tokens, self.window - len(prompt.ids)),
            request.sampling,
            block_salt(tenant_of(request.cache_salt, cache_view, self.default_salt), cache_view),
            {LOAD: cache_view.file.name} if cache_view and cache_view.file else {},
            request.past_end,
        )

    def verify(self, answer: EngineAnswer, prompt: TokenizedPrompt, request: GenerationRequest) -> VLLMGeneration:
        """The answer as text. Raises InjectionError if the engine did not reuse what memory and prompt share."""
        return verified(
            answer,
            prompt,
            as_file_handle(request.kv_cache),
            self.may_recompute,
            self.text,
            request.max_new_tokens,
        )

    def result(
        self, answer: EngineAnswer | KVMemError, prompt: TokenizedPrompt, request: GenerationRequest
    ) -> VLLMGeneration | KVMemError:
        """`verify` for one request of many: returns its error instead of raising it."""
        if isinstance(answer, KVMemError):
            return answer
        try:
            return self.verify(answer, prompt, request)
        except KVMemError as error:
            return error

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        assert isinstance(text, str)  # transformers returns a list for a batch only
        return text

    def check_length(self, tokens: int, new_tokens: int) -> None:
        """Raises PromptError if so many tokens, and `new_tokens` generated ones, do not fit the window."""
        if tokens + new_tokens > self.window:
            raise PromptError(
                f"A text of {tokens} tokens, and {new_tokens} to generate, do not fit {self.window_label}. "
                f"Shorten it, split it into memories, or {self.larger_window}."
            )


def new_manifest(
    tokens: MemoryTokens, fingerprint: ModelFingerprint, textual_memory: TextualMemoryItem | None, namespace: str
) -> ItemManifest:
    """The manifest of a file that is still to be saved; `build_s` is 0 until the build ends."""
    count = len(tokens.token_ids)
    source = None
    if textual_memory is not None:
        source = TextualSource(id=textual_memory.id, metadata=textual_memory.metadata)
    metadata = KVCacheMetadata(
        tokens=tokens,
        build_s=0.0,
        kv_bytes=fingerprint.kv_bytes(count),
        fingerprint=fingerprint,
        textual_memory=source,
        namespace=namespace,
    )
    return ItemManifest(kv_cache_id=str(uuid.uuid4()), cache_tokens=count, layers=fingerprint.layers, metadata=metadata)
