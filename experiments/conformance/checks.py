"""What kvmem gives on one architecture: each check's answer against transformers' own answer to the whole prompt."""

from __future__ import annotations

import functools
import re
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.conformance.recipes import tiny_model
from kvmem import KVCacheItem, KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache import CacheView, dynamic_cache
from kvmem.engines.graph import HFGraphBackend
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import KVMemError
from kvmem.merge import STRATEGIES, strategy
from kvmem.models import Loaded
from kvmem.prompt import Query, TokenizedPrompt
from kvmem.storage import FORMATS
from kvmem.tiers import TieredCache

STEPS = 6
"""Greedy tokens of an answer."""
TOLERANCE = 1e-3
"""By how much logits may differ, as a share of the spread of the logits: fp32 rounds differently in other chunks."""
BUDGET_BYTES = 1 << 30

MEMORY = (
    "The library opens at nine and closes at six. Members borrow five books for three weeks; guests read in the hall. "
    "A late book costs ten cents a day. The reading room on the second floor is silent, and the cafe is not."
)
OTHER_MEMORY = (
    "The museum is closed on Mondays. On the first Sunday of a month nobody pays, and groups ring before they come."
)
SHORT_MEMORIES = ("The library opens at nine.", "A late book costs ten cents.")
FIRST, SECOND = "When does the library open?", "What does a late book cost, and who may borrow one?"
LATER = [{"role": "user", "content": "I am a guest."}, {"role": "assistant", "content": "Then you read in the hall."}]

Outcome = Literal["exact", "approximate", "refused", "failed"]


class Differs(Exception):
    """An answer is not transformers' own."""


@dataclass(frozen=True)
class Cell:
    """What one check found. `why`: the refusal's first sentence, or what failed."""

    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class Findings:
    """What all checks found on one architecture.

    untested: why there is no tiny model of it; then there are no cells. bytes_per_token, bytes_per_memory: what a
    memory in fp32 takes for each token, and besides that; None if none could be built.
    """

    architecture: str
    model_class: str = ""
    cells: dict[str, Cell] = field(default_factory=dict)
    bytes_per_token: int | None = None
    bytes_per_memory: int | None = None
    untested: str = ""
    seconds: float = 0.0
    names: tuple[str, ...] = ()
    """What errors may call the model: its class, and the model types of its config and of the one inside."""


class Bench:
    """The checks of one model. Each returns its outcome; a difference, a refusal and a fault are exceptions."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.loaded = Loaded(model, tokenizer, "random weights")

    @cached_property
    def backend(self) -> HFBackend:
        return HFBackend(self.loaded)

    @cached_property
    def plain(self) -> HFBackend:
        """The same model without a chat template, whose tokens fill a short window."""
        return HFBackend(self.loaded, "plain")

    @cached_property
    def item(self) -> KVCacheItem:
        return self.memory().extract(MEMORY)

    def memory(self, backend: HFBackend | None = None, **fields: object) -> KVCacheMemory:
        config = KVCacheMemoryConfig(extractor_llm={"backend": "huggingface", "config": {}}, **fields)
        return KVCacheMemory(config, backend or self.backend)

    # The checks, in the order of the table.

    def injected(self) -> Outcome:
        """A memory, and a query."""
        return self.compare(self.backend, self.item, FIRST, must_matter=True)

    def second_query(self) -> Outcome:
        """Another query to the same item, after the first one."""
        self.compare(self.backend, self.item, FIRST)
        return self.compare(self.backend, self.item, SECOND)

    def extended_base(self) -> Outcome:
        """An item of turns that follow an item."""
        return self.compare(self.backend, self.memory().extract(LATER, base=self.item), SECOND)

    def file(self, suffix: str) -> Outcome:
        """An item that was dumped and loaded again."""
        with tempfile.TemporaryDirectory() as folder:
            memory, again = (self.memory(memory_filename=f"memory{suffix}") for _ in range(2))
            memory.add(self.item)
            memory.dump(folder)
            again.load(folder)
            (item,) = again.get_all()
            return self.compare(self.backend, item, FIRST)

    def tier(self) -> Outcome:
        """An item that went from host memory to disk, was found there by the next process, and went back."""
        with tempfile.TemporaryDirectory() as folder:
            budgets, item_id = {"ram": BUDGET_BYTES, "disk": BUDGET_BYTES}, self.item.kv_cache_id
            with closing(TieredCache(self.backend, budgets, Path(folder))) as tiers:
                tiers.put(self.item, "ram")
                tiers.move(item_id, "disk")
            with closing(TieredCache(self.backend, budgets, Path(folder))) as tiers:
                if item_id not in tiers.ids():
                    raise Differs(f"the item is not restored from disk: {', '.join(tiers.refused.values())}")
                tiers.move(item_id, "ram")
                with tiers.use(item_id) as item:
                    return self.compare(self.backend, item, FIRST)

    def merge(self, name: str) -> Outcome:
        """Two memories through a merge strategy. One that is not exact gets short ones, which stay in every window."""
        exact = strategy(name).exact
        backend = self.backend if exact else self.plain
        memory = self.memory(backend, merge=strategy(name), template=backend.template.kind)
        items = memory.extract([MEMORY, OTHER_MEMORY] if exact else list(SHORT_MEMORIES))
        memory.add(items)
        view = memory.get_cache([item.kv_cache_id for item in items])
        assert isinstance(view, CacheView)
        if exact:
            return self.compare_view(backend, view, FIRST)
        prompt = backend.split(FIRST, view)
        if prompt.memory_ids != view.tokens.token_ids:
            raise Differs(f"the cache stands for {len(prompt.memory_ids)} of {len(view.tokens.token_ids)} tokens")
        if not bool(backend.greedy(prompt, view, STEPS).logits_SV.isfinite().all()):
            raise Differs("logits are not finite")
        return "approximate"

    def graph(self) -> Outcome:
        """A memory and two queries on the fast engine."""
        backend = HFGraphBackend(self.loaded)
        item = self.memory(backend).extract(MEMORY)
        self.compare(backend, item, FIRST)
        return self.compare(backend, item, SECOND)

    # What they compare with.

    def no_reference(self) -> str:
        """Why transformers computes no answer by itself, so that there is nothing to compare with; "" if it does."""
        try:
            self.direct(TokenizedPrompt((), tuple(self.tokenizer(MEMORY).input_ids)), (0,))
        except Exception as error:  # whatever a forward pass raises of sizes that do not fit together
            return f"{type(error).__name__}: {_first_sentence(error)}"
        return ""

    def compare(self, backend: HFBackend, item: KVCacheItem, query: Query, must_matter: bool = False) -> Outcome:
        before = [
            {name: tensor.clone() for name, tensor in kept.items()} for kept in dynamic_cache.contents_of(item.kv_cache)
        ]
        memory = self.memory(backend)
        memory.add(item)
        view = memory.get_cache(item.kv_cache_id)
        assert isinstance(view, CacheView)
        outcome = self.compare_view(backend, view, query, must_matter)
        for kept, earlier in zip(dynamic_cache.contents_of(item.kv_cache), before, strict=True):
            if not all(torch.equal(now, earlier[name]) for name, now in kept.items()):
                raise Differs("the answer changed the stored item")
        return outcome

    def compare_view(self, backend: HFBackend, view: CacheView, query: Query, must_matter: bool = False) -> Outcome:
        prompt = backend.split(query, view)
        if not prompt.memory_ids:
            raise Differs("nothing of the memory was injected")
        answer = backend.greedy(prompt, view, STEPS)
        direct_SV = self.direct(prompt, answer.token_ids)
        spread = float(direct_SV.std())
        off = float((answer.logits_SV - direct_SV).abs().max()) / spread
        if not off <= TOLERANCE or answer.token_ids != tuple(direct_SV.argmax(-1).tolist()):
            raise Differs(f"logits differ by {off:.1g} of their spread")
        if must_matter:
            bare_V = self.direct(TokenizedPrompt((), prompt.query_ids), answer.token_ids)[0]
            if float((bare_V - direct_SV[0]).abs().max()) < 100 * TOLERANCE * spread:
                raise Differs("the memory has no effect on the answer, so this shows nothing")
        return "exact"

    @torch.inference_mode()
    def direct(self, prompt: TokenizedPrompt, answer: tuple[int, ...]) -> torch.Tensor:
        """The logits of each step of `answer`, (steps, vocab), by transformers alone: one pass, without a cache."""
        ids = (*prompt.ids, *answer[:-1])
        logits_SV: torch.Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(answer) :]
        return logits_SV.float()


SUFFIXES = tuple(sorted((kind.suffixes[0] for kind in FORMATS.classes().values() if kind.suffixes), reverse=True))
"""One suffix of each file format that is installed."""
ESSENTIAL = ("memory", "second query", "extended base", *SUFFIXES, "tier")
"""The checks that have to be exact on a covered architecture."""


def checks() -> dict[str, Callable[[Bench], Outcome]]:
    """The checks by name, in the order of the table. File formats and merge strategies are those that are installed."""
    found: dict[str, Callable[[Bench], Outcome]] = {
        "memory": Bench.injected,
        "second query": Bench.second_query,
        "extended base": Bench.extended_base,
    }
    for suffix in SUFFIXES:
        found[suffix] = functools.partial(Bench.file, suffix=suffix)
    found["tier"] = Bench.tier
    for kind in sorted(STRATEGIES.classes().values(), key=lambda kind: (not kind.exact, kind.name)):
        found[kind.name] = functools.partial(Bench.merge, name=kind.name)
    found["hf_graph"] = Bench.graph
    return found


def check(architecture: str, tokenizer: PreTrainedTokenizerBase, only: Collection[str] = ()) -> Findings:
    """Makes a tiny model of the architecture and runs the checks on it. only: names of checks; empty means all."""
    started = time.perf_counter()
    try:
        model = tiny_model(architecture)
    except Exception as error:  # whatever a config class or a model says of values that it does not like
        return Findings(architecture, untested=f"{type(error).__name__}: {_first_sentence(error)}")
    bench = Bench(model, tokenizer)
    cells = {name: _cell(run, bench) for name, run in checks().items() if not only or name in only}
    if all(cell.outcome == "failed" for cell in cells.values()) and (reason := bench.no_reference()):
        return Findings(architecture, untested=f"The tiny model does not compute a text: {reason}")
    per_token, per_memory = _sizes(bench) if any(cell.outcome == "exact" for cell in cells.values()) else (None, None)
    seconds = time.perf_counter() - started
    names = {model.config.model_type, model.config.get_text_config(decoder=True).model_type}
    return Findings(
        architecture,
        type(model).__name__,
        cells,
        per_token,
        per_memory,
        seconds=seconds,
        names=(type(model).__name__, *sorted(names, reverse=True)),
    )


def _cell(run: Callable[[Bench], Outcome], bench: Bench) -> Cell:
    try:
        return Cell(run(bench))
    except Differs as difference:
        return Cell("failed", str(difference))
    except KVMemError as refusal:
        return Cell("refused", _first_sentence(refusal))
    except Exception as error:  # a fault of ours or of transformers: the table shows it
        return Cell("failed", f"{type(error).__name__}: {_first_sentence(error)}")


def _first_sentence(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return re.split(r"(?<=[.!?]) (?=[A-Z])", line, maxsplit=1)[0]


def _sizes(bench: Bench) -> tuple[int, int]:
    """The bytes of a memory for each token, and besides that: a line through a memory of one length and of twice it."""
    once, twice = (bench.memory().extract(text).metadata for text in (OTHER_MEMORY, f"{OTHER_MEMORY} {OTHER_MEMORY}"))
    per_token = (twice.kv_bytes - once.kv_bytes) / (twice.token_count - once.token_count)
    return round(per_token), round(once.kv_bytes - per_token * once.token_count)
