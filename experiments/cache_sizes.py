"""Prints what memories of models with states or latents take: bytes a token and bytes a memory, without any weights.

    python -m experiments.cache_sizes                     the models of the documentation's table
    python -m experiments.cache_sizes qwen3_next jamba    transformers' names of model types

Each model has the config that transformers gives it by default, which is that of a published model, in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from kvmem.models import layout_of

DTYPE = torch.bfloat16
SHORT, LONG = 583, 6064
"""Tokens of the memories in the table: the shortest and the longest published ones."""
LFM2 = {"hidden_size": 2048, "num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}
"""LFM2-1.2B. By default all its layers are of attention."""
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "kimi_linear": {},
    "jamba": {},
    "falcon_h1": {},
    "zamba2": {},
    "olmo_hybrid": {},
    "lfm2": LFM2,
    "deepseek_v3": {},
    "deepseek_v32": {},
    "glm4_moe_lite": {},
}
"""Model type -> what differs from its default config."""


@dataclass(frozen=True)
class Size:
    """What memories of one model take."""

    model_type: str
    bytes_a_token: int
    bytes_a_memory: int
    expanded_bytes_a_token: int
    """The same with keys and values of all heads; of models with multi-head latent attention, else 0."""

    def mb(self, tokens: int) -> float:
        """MB of a memory of so many tokens."""
        return (self.bytes_a_memory + tokens * self.bytes_a_token) / 1e6


def size_of(model_type: str, fields: dict[str, Any]) -> Size:
    """Measures one model. Raises ValueError for an unknown type, and ModelError for a model that is not covered."""
    config = AutoConfig.for_model(model_type, **fields)
    layout = layout_of(config, DTYPE)
    expanded = 0
    if getattr(config, "kv_lora_rank", None) is not None:
        head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        layers = sum("k" in names for names in layout.names)
        expanded = layers * config.num_attention_heads * head * DTYPE.itemsize
    return Size(model_type, layout.bytes_a_token, layout.bytes_a_memory, expanded)


def table(sizes: Sequence[Size]) -> str:
    """The sizes as Markdown."""
    rows = [
        f"| Model | Bytes a token | as expanded heads | Bytes a memory | {SHORT:,} tokens | {LONG:,} tokens |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for size in sizes:
        expanded = f"{size.expanded_bytes_a_token:,}" if size.expanded_bytes_a_token else "–"
        rows.append(
            f"| `{size.model_type}` | {size.bytes_a_token:,} | {expanded} | {size.bytes_a_memory:,} "
            f"| {size.mb(SHORT):.1f} MB | {size.mb(LONG):.1f} MB |"
        )
    return "\n".join(rows)


def main(model_types: Sequence[str]) -> None:
    """Prints the table."""
    chosen = {name: MODELS.get(name, {}) for name in model_types} or MODELS
    print(table([size_of(name, fields) for name, fields in chosen.items()]))


if __name__ == "__main__":
    main(sys.argv[1:])
