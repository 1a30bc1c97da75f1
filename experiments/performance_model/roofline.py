"""The shortest possible time of a prefill on a machine: its FLOP and bytes divided by the machine's peak rates.

Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009. It covers dense
decoders with gated MLPs (Llama, Qwen, Mistral, …), with full and sliding-window attention, and the hybrids among them
whose other layers are Gated DeltaNet's linear attention (Qwen3.5). Of other models, `counted.py` gives a lower bound.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from experiments.performance_model.counted import CountedShape
from kvmem.errors import ModelError
from kvmem.models import layout_of

LINEAR = "linear_attention"
FOREIGN = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What transformers' models raise where a config lacks something that a count needs."""


class Shape(Protocol):
    """What the limit needs of a model."""

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """The (out, in) features of matrix products by name."""

    @property
    def weights(self) -> int:
        """The number of elements that a prefill reads at least."""

    def prefill_flop(self, query_tokens: int, cached_tokens: int = 0) -> float | None:
        """The FLOP by which MFU is defined; None where they are not known."""

    def least_flop(self, query_tokens: int, cached_tokens: int = 0) -> float:
        """The smallest number of FLOP that give the first token and the whole cache."""

    def prefill_bytes(self, query_tokens: int, cached_tokens: int, element_bytes: int) -> float:
        """The smallest number of bytes that a prefill moves."""


@dataclass(frozen=True)
class LinearLayers:
    """The layers of linear attention in a hybrid. Their recurrence takes less than 1% of the FLOP and is not counted.

    widths: of keys (and of queries) and of values, over all heads. gates: the width of each of the two gates of a head.
    state_bytes: what a memory of any length keeps of all these layers together, in bfloat16.
    """

    count: int
    key_width: int
    value_width: int
    gates: int
    state_bytes: int


@dataclass(frozen=True)
class DenseShape:
    """The sizes of a decoder's matrix products and caches."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    windows: tuple[int | None, ...]
    """The window of each layer of attention in tokens, including the current token; None for full attention."""
    gated_attention: bool = False
    """Whether the product of the queries gives a gate for each of their elements too."""
    linear: LinearLayers | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> DenseShape:
        """Reads a config, and checks the number of weights against the model, instantiated on the meta device.

        Raises ModelError if they differ, which happens with experts, latent attention or an MLP without a gate.
        """
        fields, heads = config.to_dict(), config.num_attention_heads
        layers, window = config.num_hidden_layers, fields.get("sliding_window")
        kinds = fields.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
        linear = _linear_layers(config) if LINEAR in kinds else None
        shape = cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or config.hidden_size // heads,
            vocab=config.vocab_size,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds if kind != LINEAR),
            gated_attention=linear is not None,
            linear=linear,
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
        if shape.weights != weights:
            raise ModelError(
                f"The roofline covers dense decoders with gated MLPs. It counts {shape.weights:,} weights in this "
                f"{config.model_type}, whose products have {weights:,}. Use a Llama, Qwen2, Qwen3, "
                "Qwen3.5 or Mistral model."
            )
        return shape

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """The (out, in) features of each matrix product of a layer of attention, and of the head."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {
            "q": (2 * q if self.gated_attention else q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
        }
        return attention | self._mlp | {"head": (self.vocab, self.hidden)}

    @property
    def _mlp(self) -> dict[str, tuple[int, int]]:
        wide, narrow = self.intermediate, self.hidden
        return {"gate": (wide, narrow), "up": (wide, narrow), "down": (narrow, wide)}

    @property
    def _linear_products(self) -> dict[str, tuple[int, int]]:
        """As `products`, of a layer of linear attention."""
        assert self.linear is not None
        hidden, keys, values = self.hidden, self.linear.key_width, self.linear.value_width
        mixer = {"qkv": (2 * keys + values, hidden), "z": (values, hidden), "out": (hidden, values)}
        return mixer | {"ba": (2 * self.linear.gates, hidden)} | self._mlp

    @property
    def layer_weights(self) -> int:
        """The number of elements in the matrices of one layer of attention, without the few in norms and biases."""
        return sum(out * in_ for name, (out, in_) in self.products.items() if name != "head")

    @property
    def layers(self) -> int:
        """The number of layers, of every kind."""
        return len(self.windows) + (self.linear.count if self.linear else 0)

    @property
    def state_bytes(self) -> int:
        """What a memory of any length takes besides its tokens' keys and values: the states of linear attention."""
        return self.linear.state_bytes if self.linear else 0

    @property
    def body_weights(self) -> int:
        """The number of elements in the matrices of all layers."""
        body = len(self.windows) * self.layer_weights
        if self.linear is not None:
            body += self.linear.count * sum(out * in_ for out, in_ in self._linear_products.values())
        return body

    @property
    def weights(self) -> int:
        """The number of elements that a prefill reads: every layer's matrices and the head, without embeddings."""
        return self.body_weights + self.vocab * self.hidden

    def prefill_flop(self, query_tokens: int, cached_tokens: int = 0) -> float:
        return prefill_flop(self, query_tokens, cached_tokens)

    def least_flop(self, query_tokens: int, cached_tokens: int = 0) -> float:
        return least_flop(self, query_tokens, cached_tokens)

    def prefill_bytes(self, query_tokens: int, cached_tokens: int, element_bytes: int) -> float:
        return prefill_bytes(self, query_tokens, cached_tokens, element_bytes)


def shape_of(config: PreTrainedConfig) -> Shape:
    """The exact count where the model is covered, otherwise the lower bound of its modules.

    Raises ModelError, of the exact count, if the modules can't be counted either.
    """
    try:
        return DenseShape.of(config)
    except (ModelError, *FOREIGN) as not_covered:
        try:
            return CountedShape.of(config)
        except FOREIGN as error:
            if isinstance(not_covered, ModelError):
                raise not_covered from error
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"No limit is known for {config.model_type}: {reason}") from error


def _linear_layers(config: PreTrainedConfig) -> LinearLayers | None:
    """None for linear attention of another kind, whose weights are then not those that the shape counts."""
    fields = config.to_dict()
    if "linear_num_value_heads" not in fields:
        return None
    return LinearLayers(
        count=fields["layer_types"].count(LINEAR),
        key_width=fields["linear_num_key_heads"] * fields["linear_key_head_dim"],
        value_width=fields["linear_num_value_heads"] * fields["linear_value_head_dim"],
        gates=fields["linear_num_value_heads"],
        state_bytes=layout_of(copy.deepcopy(config)).bytes_a_memory,
    )


def prefill_flop(shape: DenseShape, query_tokens: int, cached_tokens: int = 0) -> float:
    """The FLOP of a forward pass over `query_tokens` after `cached_tokens`, with logits for the last token only.

    The products take 2 FLOP for each weight and token. Attention takes 4 × heads × head_dim FLOP (scores and values)
    for each pair of a query token and a token that it attends to. MFU is defined with this count. `least_flop` is
    smaller.
    """
    products = 2 * query_tokens * shape.body_weights
    attention = sum(_attention_flop(shape, window, query_tokens, cached_tokens) for window in shape.windows)
    return float(products + attention + 2 * shape.vocab * shape.hidden)


def least_flop(shape: DenseShape, query_tokens: int, cached_tokens: int = 0) -> float:
    """The smallest number of FLOP that give the first token and the whole cache. The limit uses this count.

    Except for its keys and values, the last layer is needed for the last token only. This saves 1 to 3% of
    `prefill_flop` in a model with 28 to 80 layers. Of a hybrid, at least that is left out.
    """
    kv = 2 * shape.kv_heads * shape.head_dim * shape.hidden
    saved_products = 2 * (query_tokens - 1) * (shape.layer_weights - kv)
    last = shape.windows[-1]
    saved_attention = _attention_flop(shape, last, query_tokens - 1, cached_tokens)
    return prefill_flop(shape, query_tokens, cached_tokens) - saved_products - saved_attention


def prefill_bytes(shape: DenseShape, query_tokens: int, cached_tokens: int, element_bytes: int) -> float:
    """The smallest number of bytes that a prefill moves: it reads all weights and the cached KV, and writes new KV.

    Of a hybrid, it also reads the states behind the cached tokens, and writes those behind the new ones.
    """
    kv = 2 * shape.kv_heads * shape.head_dim
    read = sum(cached_tokens if window is None else min(cached_tokens, window - 1) for window in shape.windows)
    written = query_tokens * len(shape.windows)
    states = shape.state_bytes * ((cached_tokens > 0) + (query_tokens > 0))
    return float(element_bytes * (shape.weights + kv * (read + written)) + states)


def _attention_flop(shape: DenseShape, window: int | None, query_tokens: int, cached_tokens: int) -> int:
    pairs = _attended_pairs(cached_tokens + query_tokens, window) - _attended_pairs(cached_tokens, window)
    return 4 * shape.heads * shape.head_dim * pairs


def _attended_pairs(tokens: int, window: int | None) -> int:
    """The number of (token, attended token) pairs among the first `tokens` tokens."""
    growing = tokens if window is None else min(tokens, window)
    return growing * (growing + 1) // 2 + (tokens - growing) * (window or 0)


@dataclass(frozen=True)
class Rates:
    """The peak rates of a machine. `how` describes where the two figures come from."""

    flop_per_s: float
    bytes_per_s: float
    dtype: str
    how: str

    def best(self, other: Rates) -> Rates:
        """The higher of each rate. A calibration on a busy machine gives rates that are too low."""
        flop_per_s, bytes_per_s = max(self.flop_per_s, other.flop_per_s), max(self.bytes_per_s, other.bytes_per_s)
        return Rates(flop_per_s, bytes_per_s, self.dtype, f"{self.how} | {other.how}")

    def times(self, ranks: int) -> Rates:
        """The rates of `ranks` GPUs together."""
        how = self.how if ranks == 1 else f"{ranks} × ({self.how})"
        return Rates(ranks * self.flop_per_s, ranks * self.bytes_per_s, self.dtype, how)

    @property
    def element_bytes(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True)
class Roofline:
    """The limit for one model on one machine."""

    rates: Rates
    config: PreTrainedConfig

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.config)

    def limit_s(self, query_tokens: int, cached_tokens: int) -> float:
        """The shortest possible seconds of a prefill of `query_tokens` after `cached_tokens`."""
        flop = self.shape.least_flop(query_tokens, cached_tokens)
        moved = self.shape.prefill_bytes(query_tokens, cached_tokens, self.rates.element_bytes)
        return max(flop / self.rates.flop_per_s, moved / self.rates.bytes_per_s)

    def mfu(self, query_tokens: int, cached_tokens: int, seconds: float) -> float | None:
        """Model FLOPs utilization, the used share of the peak rate (Chowdhery et al., PaLM, 2022, appendix B).

        None for a model whose FLOP are not all counted.
        """
        flop = self.shape.prefill_flop(query_tokens, cached_tokens)
        return None if flop is None else flop / seconds / self.rates.flop_per_s
