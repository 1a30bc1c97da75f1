"""A lower bound on the work of a prefill for models that the exact count does not cover, from the model's own modules.

Mixtures of experts, latent attention, MLPs without a gate, state-space layers: what a forward pass calls is asked of
the model, instantiated on the meta device, instead of being derived from its config. Left out are the products inside
of attention (scores and values), recurrences, convolutions, norms and biases, so that the limit is lower than that of
`DenseShape`, and stays a limit.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvmem.models import layout_of

PROBE_TOKENS = 4
IN_A_LAYER = re.compile(r"(.*?\.\d+)\.")
"""The name of a decoder layer, at the start of the names of what is inside it."""
EXPERTS = re.compile(r"(.*\bexperts)(\.\d+\.|\.|$)")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")
"""Names in transformers' configs of the number of experts that compute a token."""
CALIBRATED = 4
"""Sizes of products by which a machine's rate is measured: the largest ones."""


@dataclass(frozen=True)
class CountedShape:
    """The weights that a token passes through, counted on the modules that a forward pass calls.

    body: weights of all layers' products, of experts those that compute one token. largest_layer: the share of it of
    the layer with the most. head: weights of the product that gives the logits. kv_elements: of the keys, values or
    latents that a token adds to the cache; 0 for a model with windows, which does not read all of them.
    products: (out, in) features of the largest products.
    """

    body: int
    largest_layer: int
    head: int
    kv_elements: int
    products: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> CountedShape:
        """Counts one forward pass of a few tokens on the meta device, which needs no memory for weights.

        Raises what transformers raises if the model can't be made or run there.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).eval()
        with contextlib.suppress(AttributeError, ValueError):  # older transformers, and models without experts
            model.set_experts_implementation("grouped_mm")  # its shapes don't depend on the tokens
        called = _called(model)
        head = model.get_output_embeddings()
        layers: Counter[str] = Counter()
        sizes: set[tuple[int, int]] = set()
        for name, module in called.items():
            if module is head:
                continue
            in_layer = IN_A_LAYER.match(name)
            weights = _weights_a_token(name, module, config)
            layers[in_layer.group(1) if in_layer else ""] += weights
            if isinstance(module, nn.Linear | Conv1D):
                sizes |= {_features(module)} if weights else set()
            elif weights:
                sizes |= {(p.shape[1], p.shape[2]) for p in module.parameters(recurse=False) if p.ndim == 3}
        largest = sorted(sizes, key=math.prod, reverse=True)[:CALIBRATED]
        return cls(
            body=layers.total(),
            largest_layer=max(layers.values(), default=0),
            head=head.weight.numel() if head is not None else 0,
            kv_elements=0 if _has_windows(config) else layout_of(copy.deepcopy(config)).bytes_a_token // 2,
            products={f"{out} × {in_}": (out, in_) for out, in_ in largest},
        )

    @property
    def weights(self) -> int:
        """The number of elements that a prefill of one token reads."""
        return self.body + self.head

    def prefill_flop(self, query_tokens: int, cached_tokens: int = 0) -> float | None:
        """None: attention's own FLOP are not counted, so that a share of the peak rate would be too low."""
        return None

    def least_flop(self, query_tokens: int, cached_tokens: int = 0) -> float:
        """FLOP that any prefill takes: 2 a weight and token. Of the last layer only the last token's are needed."""
        return 2.0 * (query_tokens * (self.body - self.largest_layer) + self.head)

    def prefill_bytes(self, query_tokens: int, cached_tokens: int, element_bytes: int) -> float:
        """Bytes that any prefill moves: weights, of experts those of one token, and the cached and the new tokens."""
        return float(element_bytes * (self.weights + self.kv_elements * (cached_tokens + query_tokens)))


def _called(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> module, of those that a forward pass calls and that have products with weights, each once."""
    called: dict[str, nn.Module] = {}

    def note(name: str) -> torch.utils.hooks.RemovableHandle:
        return model.get_submodule(name).register_forward_hook(lambda module, _in, _out: called.update({name: module}))

    handles = [note(name) for name, module in model.named_modules() if _has_products(name, module)]
    with torch.inference_mode():
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
        model(input_ids=ids, use_cache=True)
    for handle in handles:
        handle.remove()
    return called


def _has_products(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | Conv1D):
        return True
    return name.endswith("experts") and any(p.ndim == 3 for p in module.parameters(recurse=False))


def _features(module: nn.Linear | Conv1D) -> tuple[int, int]:
    rows, columns = (int(size) for size in module.weight.shape)
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _weights_a_token(name: str, module: nn.Module, config: PreTrainedConfig) -> int:
    """The weights of the module that one token passes through."""
    if not isinstance(module, nn.Linear | Conv1D):
        stacked = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        return sum(min(_chosen(config), p.shape[0]) * p[0].numel() for p in stacked)
    if (inside := EXPERTS.match(name)) and inside.group(2).strip("."):  # a list of experts, each with its own products
        return 0
    return module.weight.numel()


def _chosen(config: PreTrainedConfig) -> int:
    """How many experts compute a token, 1 where the config has no name for it that is known here."""
    fields = config.to_dict()
    return max((fields[name] for name in CHOSEN if isinstance(fields.get(name), int)), default=1)


def _has_windows(config: PreTrainedConfig) -> bool:
    fields = config.to_dict()
    names = ("sliding_window", "attention_window_size", "window_size", "index_topk", "attention_chunk_size")
    return any(fields.get(name) for name in names)
