"""Functions that a measurement needs in addition to `MeasuredBackend`, with an implementation for each engine.

The functions dispatch on the engine's class (`functools.singledispatch`). An engine from another package registers its
own with `reference_forward.register`, `embedding_of.register` and `engine_conditions.register`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from torch import nn

from experiments.measurement import vllm_generate
from experiments.measurement.product_witness import ProductWitness
from experiments.measurement.reference import ReferenceForward, ReferenceLogits, TransformersForward
from kvmem.engines import FirstToken, MeasuredBackend
from kvmem.engines.graph import HFGraphBackend
from kvmem.engines.huggingface import HFBackend, HFRanksBackend
from kvmem.engines.vllm import VLLMBackend
from kvmem.errors import ConfigError
from kvmem.prompt import TokenizedPrompt


class VLLMForward(ReferenceForward):
    """vLLM's own cold prefill, through its public API: whole, and in two chunks.

    vLLM reports log-probabilities of its largest logits only, so the others are -inf, and only the first step and the
    step `at` are computed.
    """

    name = "vLLM's own cold prefill"

    def __init__(self, backend: VLLMBackend) -> None:
        self.backend = backend

    def logits(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], at: int | None) -> ReferenceLogits:
        steps = tuple(sorted({0, at or 0}))
        runs = [self._two_chunkings((*prompt_ids, *answer_ids[:step])) for step in steps]
        return ReferenceLogits(tuple(torch.stack(rows) for rows in zip(*runs, strict=True)), steps)

    def first_token(self, token_ids: Sequence[int]) -> int:
        return vllm_generate.first_token(self.backend.llm, TokenizedPrompt((), tuple(token_ids))).id

    def prepare(self) -> None:
        self.backend.reset()

    def _two_chunkings(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.backend.two_chunkings(ids, len(ids) // 2)


@singledispatch
def reference_forward(backend: MeasuredBackend) -> ReferenceForward:
    """The independent forward pass beside an engine. Raises ConfigError for an engine without one."""
    raise ConfigError(
        f"backend={type(backend).name} has no independent forward pass that its figures can be judged by. "
        "Register one with experiments.measurement.engine_adapters.reference_forward.register."
    )


@reference_forward.register
def _hf_reference(backend: HFBackend) -> ReferenceForward:
    return TransformersForward(backend.model)


@reference_forward.register
def _vllm_reference(backend: VLLMBackend) -> ReferenceForward:
    return VLLMForward(backend)


@singledispatch
def embedding_of(backend: MeasuredBackend) -> nn.Module | None:
    """The module that every token of the engine's forward passes goes through; None: none of this process.

    A `Witness` counts there what the engine computes.
    """
    return None


@embedding_of.register
def _hf_embedding(backend: HFBackend) -> nn.Module | None:
    return backend.model.get_input_embeddings()


@embedding_of.register
def _hf_graph_embedding(backend: HFGraphBackend) -> nn.Module | None:
    return None  # it runs the weights without calling the modules


@singledispatch
def products_seen(backend: MeasuredBackend, call: Callable[[], FirstToken]) -> tuple[FirstToken, int] | None:
    """One more `call`, and the tokens that passed through every layer's matrix products in it (`ProductWitness`).

    None for an engine whose tokens `embedding_of` counts, or that computes in other processes.
    """
    return None


@products_seen.register
def _hf_graph_products(backend: HFGraphBackend, call: Callable[[], FirstToken]) -> tuple[FirstToken, int] | None:
    """Without graphs and compiled layers, which call no function of torch that could be seen."""
    engine = backend.engine
    graph_up_to, engine.graph_up_to = engine.graph_up_to, 0
    try:
        backend.reset()
        with torch.compiler.set_stance("force_eager"), ProductWitness(backend.model) as witness:
            token = call()
    finally:
        engine.graph_up_to = graph_up_to
    return replace(token, logits_V=None if token.logits_V is None else token.logits_V.clone()), witness.tokens


@singledispatch
def engine_conditions(backend: MeasuredBackend) -> dict[str, Any]:
    """The settings that the engine's figures depend on, such as its version, graph mode and sizes, as plain JSON."""
    return {}


@engine_conditions.register
def _hf_conditions(backend: HFBackend) -> dict[str, Any]:
    return {"graphs": "none (eager)"}


@engine_conditions.register
def _hf_ranks_conditions(backend: HFRanksBackend) -> dict[str, Any]:
    return {"graphs": "none (eager)", "tensor_parallel": backend.ranks}


@engine_conditions.register
def _hf_graph_conditions(backend: HFGraphBackend) -> dict[str, Any]:
    engine = backend.engine
    return {
        "graphs": f"one a query length, up to {engine.graph_up_to} tokens" if engine.graph_up_to else "none",
        "left_out": ", ".join(engine.left_out) or "nothing",
        "compile": engine.compile,
        "fused": engine.fused,
        "pad_to": engine.pad_to,
        "pad_up_to": engine.config.pad_up_to,
        "capacity_tokens": engine.config.capacity_tokens,
        "buffers": engine.config.buffers,
        "warm_up": dataclasses.asdict(engine.warm_up),
    }


@engine_conditions.register
def _vllm_conditions(backend: VLLMBackend) -> dict[str, Any]:
    return backend.conditions()
