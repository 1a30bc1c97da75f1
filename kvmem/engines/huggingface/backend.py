"""The Hugging Face transformers engine: items are DynamicCaches, built and injected in this process."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import DynamicCache
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kvmem.cache import (
    ENTRIES,
    CacheView,
    KeptPrefix,
    KVCacheItem,
    KVCacheMetadata,
    MemoryTokens,
    Source,
    TextualMemoryItem,
    TextualSource,
    dynamic_cache,
    layer_that_is_not_finite,
    observing,
)
from kvmem.compaction import CompactionStrategy, Repeat, compact
from kvmem.engines.base import BetweenLayers, FirstToken, GreedyAnswer, MeasuredBackend, check_view
from kvmem.engines.generation import (
    Generation,
    Sampler,
    Sampling,
    Token,
    as_text,
    check_generation,
    finish_reason,
)
from kvmem.engines.huggingface.config import DTYPES, HFConfig, device_of
from kvmem.engines.huggingface.coverage import check_covered
from kvmem.engines.huggingface.model_guard import ModelGuard
from kvmem.errors import CompactionError, MergeError, ModelError, PromptError, check_kind
from kvmem.merge import MergeStrategy, merged_tokens
from kvmem.models import decode_one_token, decoder_layers, loading, max_positions, prefill
from kvmem.prompt import PromptTemplate, Query, TemplateKind, TokenizedPrompt, common_prefix

RECOMPUTED = (
    "The memory was computed again: the prompt does not begin with all of its tokens, and layers with states or a "
    "sliding window, or those of a compacted memory, can't go back to fewer."
)
"""The note of an answer for which a memory could not be cut."""
REPEAT = "Repeat the text above word for word."
"""The query behind a memory whose answer is the memory itself, for strategies that look at attention."""
EXTENDED = (
    "A compacted memory can't be extended by more turns, whose keys and values would miss what it dropped. Extract all "
    "turns together, or extend the memory as it was before it was compacted."
)
SAMPLES = 5
SAMPLING_S = 1.0
"""A prefill length is timed `SAMPLES` times, or until this has passed: noise is a small part of a long prefill."""


class HFBackend(MeasuredBackend):
    """A transformers model with its tokenizer and prompt template."""

    name: ClassVar[str] = HFConfig.backend
    config_class: ClassVar[type] = HFConfig
    grows_views: ClassVar[bool] = True
    """Whether an answer grows the view that it is given, so that one view can serve one answer at a time."""

    takes_compacted: ClassVar[bool] = True
    answers_together: ClassVar[bool] = False
    """Whether `answer_batch` decodes several answers in one pass."""

    def __init__(
        self,
        loaded: loading.Loaded,
        template: TemplateKind = "chat",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_covered(loaded.model)
        self.model = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.template = PromptTemplate(loaded.tokenizer, template, chat_template_kwargs)
        self.guard = ModelGuard(loaded.model, loaded.tokenizer, loaded.origin, self.template.identity)
        self.fingerprint = self.guard.fingerprint
        self.model_config = loaded.model.config.get_text_config(decoder=True)
        self.device = self.compute_device = loaded.model.device
        self.dtype = loaded.model.dtype
        self.attention = self.model_config._attn_implementation
        ends = self.model.generation_config.eos_token_id
        tokens = ends if isinstance(ends, list) else [ends]
        self._counting = threading.Lock()
        self.recomputed = 0
        """How many answers and builds computed a stored memory again because it could not be cut to the part that the
        prompt begins with: its layers keep states, or a sliding window has dropped tokens."""
        self.end_tokens = {token for token in [*tokens, self.tokenizer.eos_token_id] if token is not None}

    @classmethod
    def open(
        cls,
        config: HFConfig,
        template: TemplateKind = "chat",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> HFBackend:
        return cls(cls.loaded(config), template, chat_template_kwargs)

    @staticmethod
    def loaded(config: HFConfig) -> loading.Loaded:
        """Loads the model and the tokenizer that `config` names."""
        return loading.load(
            config.model_name_or_path,
            device_of(config),
            DTYPES.get(config.dtype),
            config.attn_implementation,
            config.seed,
            config.tokenizer_name_or_path,
        )

    def build(
        self,
        source: Source,
        textual_memory: TextualMemoryItem | None = None,
        base: KVCacheItem | None = None,
        between_layers: BetweenLayers | None = None,
        namespace: str = "",
    ) -> KVCacheItem:
        return self.build_tokens(self.template.memory_tokens(source), textual_memory, base, between_layers, namespace)

    def build_tokens(
        self,
        tokens: MemoryTokens,
        textual_memory: TextualMemoryItem | None = None,
        base: KVCacheItem | None = None,
        between_layers: BetweenLayers | None = None,
        namespace: str = "",
    ) -> KVCacheItem:
        """As `build`, for tokens that are already known, such as those of several texts joined.

        Raises ModelError if a key or value that was computed is NaN or infinite; `check_built` says what that costs.
        """
        self.check_model(by_transformers=False)
        self._check_length(len(tokens.token_ids))
        if base is not None and base.metadata.compaction is not None:
            raise CompactionError(EXTENDED)
        started = time.perf_counter()
        cache = self._prefilled(tokens.token_ids, base, between_layers)
        self._synchronize()
        build_s = time.perf_counter() - started
        self.check_built(cache, self._computed(tokens, base))
        stored = dynamic_cache.compact(cache, self.model_config)
        return KVCacheItem(
            kv_cache=stored,
            metadata=KVCacheMetadata(
                tokens=tokens,
                build_s=build_s,
                kv_bytes=dynamic_cache.nbytes(stored),
                fingerprint=self.fingerprint,
                textual_memory=_textual_source(textual_memory),
                lossy=base.metadata.lossy if base is not None else "",
                namespace=namespace,
            ),
        )

    def compact(self, item: KVCacheItem, strategy: CompactionStrategy) -> KVCacheItem:
        if not self.takes_compacted:
            return super().compact(item, strategy)
        self.check_model()
        self.check(item)
        return compact(item, strategy, self.model, self.repeat_of(item.metadata.tokens))

    def repeat_of(self, tokens: MemoryTokens) -> Repeat:
        """What follows a memory so that the model repeats it, in the words of `REPEAT`."""
        prompt = self.template.split(tokens, REPEAT)
        return Repeat(prompt.ids[len(tokens.token_ids) :], tokens.body_ids + tokens.rest_ids)

    def check_built(self, cache: DynamicCache, computed: int) -> None:
        """Raises ModelError if a key or value of the last `computed` tokens, or a state, is NaN or infinite.

        Such a cache makes every answer noise, and a file refuses it. The check reads the new keys and values once: 6 ms
        of a build of 1.6 s (0.4%) for 882 tokens of SmolLM2-135M in float32 on one CPU core. On an H100, 1,000 tokens
        of its size take 0.2 ms.
        """
        layers = [
            [tensor[..., -computed:, :] if name in ENTRIES else tensor for name, tensor in kept.items()]
            for kept in dynamic_cache.contents_of(cache)
        ]
        layer = layer_that_is_not_finite(layers)
        if layer is not None:
            raise ModelError(
                f"The model computed NaN or infinite keys or values in layer {layer}, so nothing was stored: its "
                "weights are damaged, or it overflows its dtype. Load it in a dtype of a larger range, such as "
                "bfloat16 or float32."
            )

    def _computed(self, tokens: MemoryTokens, base: KVCacheItem | None) -> int:
        """How many tokens of a build are computed. The others are those of `base`, which was checked before."""
        held = 0 if base is None else held_by(base, tokens.token_ids)
        reused = base is not None and dynamic_cache.can_crop(base.kv_cache, held)
        return len(tokens.token_ids) - (held if reused else 0)

    def check_model(self, by_transformers: bool = True) -> None:
        """Raises ModelChangedError if what is about to be computed would no longer fit the stored memories.

        by_transformers: whether the model's own forward method computes it. Here it always does.
        """
        self.guard.check()

    def view(self, items: Sequence[KVCacheItem], merge: MergeStrategy, separator: str) -> CacheView:
        self.check_model(by_transformers=len(items) > 1)
        for item in items:
            self.check(item)
        if len(items) == 1:
            (item,) = items
            return dynamic_cache.view_of(
                item.kv_cache, item.metadata.tokens, self.model_config, item.metadata.lossy, self.fingerprint
            )
        self._check_merge(merge, items)
        separator_ids = self.template.separator_ids(separator)
        tokens = merged_tokens(items, separator_ids)
        self._check_length(len(tokens.token_ids))
        # An exact merge computes all tokens again, so nothing of a quantized item is left.
        lossy = [] if merge.exact else sorted({item.metadata.lossy for item in items} - {""})
        merged = merge.merge(items, separator_ids, self.model)
        return dynamic_cache.view_of(merged, tokens, self.model_config, ", ".join(lossy), self.fingerprint)

    def _check_merge(self, merge: MergeStrategy, items: Sequence[KVCacheItem]) -> None:
        """Raises MergeError for a merge of stored blocks, of a model whose layers keep more than keys and values, or of
        a compacted memory."""
        compacted = next((item for item in items if item.metadata.compaction is not None), None)
        if compacted is not None and not merge.exact:
            raise MergeError(
                f"{merge.name} joins an entry for each token, and item {compacted.kv_cache_id} is "
                f"{compacted.metadata.lossy}. Use merge=Reprefill, which computes the texts again, or merge memories "
                "that were extracted without compaction."
            )
        layout = self.fingerprint.layout
        if merge.exact or layout is None or layout.has_keys_and_values_only:
            return
        why = (
            "linear-attention or state-space layers keep states: a state sums up all tokens before it, so stored ones "
            "can't be joined"
            if layout.has_states
            else "sparse attention keeps the keys of an indexer, which it does not move"
        )
        raise MergeError(
            f"{merge.name} does not cover {self.model_config.model_type}, whose {why}. Use merge=Reprefill."
        )

    def split(
        self, query: Query, kv_cache: CacheView | None = None, model_checked_later: bool = False
    ) -> TokenizedPrompt:
        """The prompt of `query`, split after what `kv_cache` holds of it.

        model_checked_later: leaves `check_model` to the caller, who calls it before an answer is given out.

        Raises PromptError if the prompt exceeds the model's positions, ArgumentError if `kv_cache` is not a cache view,
        and FingerprintError if it comes from another model.
        """
        if not model_checked_later:
            self.check_model(by_transformers=False)
        if kv_cache is not None:
            check_view(kv_cache, self.fingerprint, self.shards)
        prompt = self.template.bare(query) if kv_cache is None else self.template.split(kv_cache.tokens, query)
        self._check_length(len(prompt.ids))
        if kv_cache is None:
            return prompt
        held = min(len(prompt.memory_ids), kv_cache.get_seq_length())
        if not dynamic_cache.can_crop(kv_cache, held):
            held = 0
        return TokenizedPrompt(prompt.ids[:held], prompt.ids[held:])

    def write(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        self.guard.verify()  # a write that the cheap check does not see must not outlive this process in a file
        super().write(path, items)

    def read(self, path: Path) -> list[KVCacheItem]:
        self.guard.verify()
        return super().read(path)

    def adopt_model(self) -> None:
        """Goes on with a model that was changed on purpose. Memories that were built before are refused then."""
        self.fingerprint = self.guard.adopt()

    def prefill(self, prompt: TokenizedPrompt, kv_cache: CacheView | None = None) -> tuple[torch.Tensor, Any]:
        """The last token's logits, (vocab,), and the state that decoding extends: here a cache of the whole prompt.

        If `kv_cache` holds `prompt.memory_ids`, only `prompt.query_ids` are computed. Without a cache, or if it can't
        be cropped to them, all are. What `kv_cache.keep` asks for is copied to `kv_cache.kept`. Raises ChangedFileError
        if the file that the memory is mapped from changed.
        """
        cache: DynamicCache | None = kv_cache
        if cache is None or not self._cropped(cache, len(prompt.memory_ids)):
            cache = dynamic_cache.empty(self.model_config)
        dynamic_cache.check_files(cache)
        held = cache.get_seq_length()
        ends_at, copied = self._kept_tokens(prompt, kv_cache, held), None
        started = time.perf_counter()
        if ends_at and self.keeps_last_position:
            prefill(self.model, prompt.ids[cache.get_seq_length() : ends_at], cache)
            copied = dynamic_cache.first_tokens(cache, ends_at, self.model_config)
        logits_V = prefill(self.model, prompt.ids[cache.get_seq_length() :], cache)
        seconds = self._prefilled_s(started, kv_cache, len(prompt.ids) - held, held) if kv_cache is not None else 0.0
        if ends_at and kv_cache is not None:
            copied = copied or dynamic_cache.first_tokens(cache, ends_at, self.model_config)
            kv_cache.kept = self._kept(prompt, kv_cache, copied, seconds)
        dynamic_cache.check_files(cache)  # from here on the view has copies of what it read
        return logits_V, cache

    def _prefilled_s(self, started: float, view: CacheView, new: int, held: int) -> float:
        """Seconds of a prefill with `view`, which is told of it; 0 if the view needs to know nothing."""
        if view.keep is None and view.on_prefill is None:
            return 0.0
        self._synchronize()
        seconds = time.perf_counter() - started
        if view.on_prefill is not None:
            view.on_prefill(new, held, seconds)
        return seconds

    def _kept_tokens(self, prompt: TokenizedPrompt, view: CacheView | None, held: int) -> int:
        """How many tokens of the prompt `view.keep` asks for; 0 if none, or if all of them are among the `held` ones.

        If the prompt begins with a part of them, it is that part, unless layers keep something for one position only.
        """
        if view is None:
            return 0
        view.kept = None
        if view.keep is None or dynamic_cache.is_compacted(view):  # entries of which no text's prefix can be copied
            return 0
        wanted = view.keep.token_ids
        shared = min(common_prefix(wanted, prompt.ids), len(prompt.ids) - 1)
        return 0 if shared <= held or (self.keeps_last_position and shared < len(wanted)) else shared

    @cached_property
    def keeps_last_position(self) -> bool:
        """Whether a cache can't be cut at an earlier token: its layers keep states, or drop tokens behind a window."""
        return self.fingerprint.keeps_states or dynamic_cache.has_sliding_layers(self.model_config)

    def _kept(self, prompt: TokenizedPrompt, view: CacheView, copied: DynamicCache, seconds: float) -> KeptPrefix:
        """What was copied of a prompt whose prefill took `seconds`."""
        tokens = prompt.ids[: copied.get_seq_length()]
        return KeptPrefix(copied, tokens, view.lossy if prompt.memory_ids else "", seconds)

    def kept_item(
        self, kept: KeptPrefix, tokens: MemoryTokens, textual_memory: TextualMemoryItem, namespace: str = ""
    ) -> KVCacheItem:
        """An item of `tokens` from what an answer kept. Its `build_s` is that of the answer's prefill.

        tokens: what `kept` begins with; a cache that can't be cut has exactly these. Raises ModelError as
        `build_tokens`.
        """
        count = len(tokens.token_ids)
        assert kept.token_ids[:count] == tokens.token_ids
        cache = kept.cache
        if count < len(kept.token_ids):
            cache = dynamic_cache.first_tokens(cache, count, self.model_config)
        self.check_built(cache, count)
        return KVCacheItem(
            kv_cache=cache,
            metadata=KVCacheMetadata(
                tokens=tokens,
                build_s=kept.prefill_s,
                kv_bytes=dynamic_cache.nbytes(cache),
                fingerprint=self.fingerprint,
                textual_memory=_textual_source(textual_memory),
                lossy=kept.lossy,
                namespace=namespace,
            ),
        )

    def first_token(self, prompt: TokenizedPrompt, kv_cache: CacheView | None = None) -> FirstToken:
        logits_V, _ = self.prefill(prompt, kv_cache)
        return FirstToken(int(logits_V.argmax()), len(prompt.memory_ids), logits_V=logits_V)

    @torch.inference_mode()
    def greedy(self, prompt: TokenizedPrompt, kv_cache: CacheView | None, steps: int) -> GreedyAnswer:
        logits_V, cache = self.prefill(prompt, kv_cache)
        token_ids, logits = [int(logits_V.argmax())], [logits_V.float().cpu()]
        for _ in range(steps - 1):
            logits_V = self.decode_one_token(token_ids[-1], cache)
            token_ids.append(int(logits_V.argmax()))
            logits.append(logits_V.float().cpu())
        return GreedyAnswer(tuple(token_ids), torch.stack(logits))

    def extend(self, token_ids: Sequence[int], state: Any) -> torch.Tensor:
        """Appends `token_ids` to the state that `prefill` returned. Returns the logits after them, (vocab,)."""
        return prefill(self.model, token_ids, state)

    def decode_one_token(self, token_id: int, state: Any) -> torch.Tensor:
        """Appends `token_id` to the state that `prefill` returned. Returns the logits after it, (vocab,)."""
        return decode_one_token(self.model, token_id, state)

    def generate(
        self,
        query: Query,
        kv_cache: CacheView | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Generation:
        """Answers `query` (text or chat turns), with the memory in `kv_cache` or without one.

        The answer ends where prompt and answer fill the model's positions, and its `finish_reason` says so.

        Raises PromptError, FingerprintError, ConfigError or ArgumentError before anything is computed.
        """
        check_generation(max_new_tokens, sampling)
        prompt = self.split(query, kv_cache)
        possible = self.room(prompt, max_new_tokens)
        ids = tuple(self.decode(prompt, kv_cache, possible, sampling or Sampling()))
        return self.generation(ids, prompt, len(prompt.memory_ids), kv_cache, possible, max_new_tokens)

    def answer_batch(
        self,
        queries: Sequence[Query],
        kv_cache: CacheView,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """Answers each query with the same memory, as `generate` does."""
        check_generation(max_new_tokens, sampling)
        check_kind("queries", queries, list, tuple, way_out="For one query, use generate.")
        return [self.generate(query, kv_cache, max_new_tokens, sampling) for query in queries]

    def stream(
        self,
        query: Query,
        kv_cache: CacheView | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Iterator[Token]:
        """The same answer as `generate`, token by token. Raises as `generate`, before the first token."""
        check_generation(max_new_tokens, sampling)
        prompt = self.split(query, kv_cache)
        possible = self.room(prompt, max_new_tokens)
        tokens = self.decode(prompt, kv_cache, possible, sampling or Sampling())
        return as_text(tokens, self._text, possible, max_new_tokens)

    def room(self, prompt: TokenizedPrompt, max_new_tokens: int) -> int:
        """How many of `max_new_tokens` have a position behind `prompt`. Raises PromptError if none has."""
        possible = min(max_new_tokens, self.max_tokens - len(prompt.ids))
        if possible < 1:
            raise PromptError(
                f"The prompt's {len(prompt.ids)} tokens fill the model's {self.max_tokens} positions, and leave none "
                "to an answer. Shorten the memory or the query."
            )
        return possible

    def generation(
        self,
        ids: Sequence[int],
        prompt: TokenizedPrompt,
        held: int,
        kv_cache: CacheView | None,
        possible: int,
        requested: int,
    ) -> Generation:
        """The answer `ids` to `prompt`, whose first `held` tokens came from `kv_cache`."""
        reason = finish_reason(len(ids), possible, requested)
        return Generation(self._text(ids), tuple(ids), len(prompt.ids), held, reason, *origin_of(prompt, kv_cache))

    def _text(self, token_ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        assert isinstance(text, str)  # of one sequence, not of a batch
        return text

    def decode(
        self, prompt: TokenizedPrompt, kv_cache: CacheView | None, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[int]:
        """The token ids of an answer to a prompt that is already split, up to an end token."""
        sampler = Sampler(sampling, self.device)
        with kv_cache.exclusively() if kv_cache is not None and self.grows_views else nullcontext():
            logits_V, cache = self.prefill(prompt, kv_cache)
            for step in range(max_new_tokens):
                token = sampler.pick(logits_V)
                if token in self.end_tokens:
                    return
                yield token
                if step + 1 < max_new_tokens:
                    logits_V = self.decode_one_token(token, cache)

    def measure_prefill(self, lengths: Sequence[int]) -> list[float]:
        seconds = []
        for tokens in lengths:
            self._prefill_s(tokens)  # compiles, captures, loads libraries
            samples = [self._prefill_s(tokens)]
            while len(samples) < SAMPLES and sum(samples) < SAMPLING_S:
                samples.append(self._prefill_s(tokens))
            seconds.append(statistics.median(samples))
        return seconds

    def _prefill_s(self, tokens: int) -> float:
        prompt = TokenizedPrompt((), tuple(10 + i % 1000 for i in range(tokens)))
        started = time.perf_counter()
        self.first_token(prompt)
        return time.perf_counter() - started

    def _prefilled(
        self, token_ids: tuple[int, ...], base: KVCacheItem | None, between_layers: BetweenLayers | None
    ) -> DynamicCache:
        """The cache of `token_ids`; the tokens that `base` holds are not computed."""
        cache = dynamic_cache.empty(self.model_config)
        if base is not None:
            cache = self._prefix_view(base.kv_cache, base.metadata.tokens, held_by(base, token_ids))
        with self._layer_hooks(between_layers):
            prefill(self.model, token_ids[cache.get_seq_length() :], cache)
        return cache

    @contextmanager
    def _layer_hooks(self, between_layers: BetweenLayers | None) -> Iterator[None]:
        """Inside the block, this thread's forward passes call `between_layers` before each decoder layer."""
        if between_layers is None:
            yield
            return
        builder = threading.get_ident()

        @observing
        def before_layer(*_: Any) -> None:
            if threading.get_ident() == builder:  # requests of other threads run the same modules
                self._synchronize()
                between_layers()

        hooks = [layer.register_forward_pre_hook(before_layer) for layer in decoder_layers(self.model)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _prefix_view(self, cache: DynamicCache, tokens: MemoryTokens, length: int) -> DynamicCache:
        cache_view = dynamic_cache.view_of(cache, tokens, self.model_config)
        return cache_view if self._cropped(cache_view, length) else dynamic_cache.empty(self.model_config)

    def _cropped(self, cache: DynamicCache, tokens: int) -> bool:
        """Crops the cache in place. Returns False, and counts it, if that is not possible."""
        cropped = dynamic_cache.crop(cache, tokens)
        if not cropped:
            with self._counting:
                self.recomputed += 1
        return cropped

    def _check_length(self, tokens: int) -> None:
        positions = max_positions(self.model_config)
        if tokens > positions:
            raise PromptError(
                f"A text of {tokens} tokens does not fit the model's {positions} positions. "
                "Shorten it, or split it into memories."
            )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def held_by(base: KVCacheItem, token_ids: tuple[int, ...]) -> int:
    """How many of the first `token_ids` `base` holds. Never the last one, because its logits are needed."""
    return min(common_prefix(base.metadata.tokens.token_ids, token_ids), len(token_ids) - 1)


def origin_of(prompt: TokenizedPrompt, kv_cache: CacheView | None) -> tuple[str, str]:
    """The `note` and `lossy` of an answer with this cache."""
    if kv_cache is None:
        return "", ""
    if prompt.memory_ids:
        return kv_cache.note, kv_cache.lossy
    if kv_cache.tokens.token_ids and not dynamic_cache.can_crop(kv_cache, 0):
        return " ".join(filter(None, [kv_cache.note, RECOMPUTED])), ""
    return kv_cache.note, ""


def _textual_source(memory: TextualMemoryItem | None) -> TextualSource | None:
    return None if memory is None else TextualSource(id=memory.id, metadata=memory.metadata)
