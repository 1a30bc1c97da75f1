"""Functions that a measurement needs in addition to `MeasuredBackend`, with an implementation for each engine.

Both functions dispatch on the engine's class (`functools.singledispatch`). An engine from another package registers its
implementations with `two_chunkings.register` and `engine_conditions.register`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch

from kvmem.engines import MeasuredBackend
from kvmem.engines.graph import HFGraphBackend
from kvmem.engines.huggingface import HFBackend, HFRanksBackend
from kvmem.engines.vllm import VLLMBackend
from kvmem.errors import ConfigError
from kvmem.prompt import TokenizedPrompt


@singledispatch
def two_chunkings(backend: MeasuredBackend, token_ids: Sequence[int], at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last token's logits, each of shape (vocab,), after prefilling a prompt in one chunk and in two chunks.

    The second chunk starts at token `at`, or as near to it as the engine can. No stored memory is involved, so the two
    results differ only by rounding. A logit is -inf if the engine does not report it.

    Raises ConfigError if the engine has no implementation.
    """
    raise ConfigError(
        f"backend={type(backend).name} has no two_chunkings, which measures its rounding noise. "
        "Register one with experiments.measurement.engine_adapters.two_chunkings.register."
    )


@two_chunkings.register
def _hf_two_chunkings(backend: HFBackend, token_ids: Sequence[int], at: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tuple(token_ids)
    whole_V = backend.prefill(TokenizedPrompt((), ids))[0].float()
    _, state = backend.prefill(TokenizedPrompt((), ids[:at]))
    return whole_V, backend.extend(ids[at:], state).float()


@two_chunkings.register
def _vllm_two_chunkings(backend: VLLMBackend, token_ids: Sequence[int], at: int) -> tuple[torch.Tensor, torch.Tensor]:
    return backend.two_chunkings(token_ids, at)


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
