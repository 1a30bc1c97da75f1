"""What families of models name differently: the number of positions, and the list of decoder layers."""

from __future__ import annotations

import inspect
import sys
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvmem.errors import ModelError

NO_MAXIMUM = sys.maxsize
"""The positions of a model that has no maximum."""

_POSITION_FIELDS = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # the last are MPT's, Whisper's

_AFTER_PADDING = frozenset(
    {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)
"""Families (`model_type`) whose first token has the position behind the padding token's id."""


def max_positions(config: PreTrainedConfig) -> int:
    """How many tokens have a position; NO_MAXIMUM for a model with ALiBi and no limit, such as BLOOM."""
    stated = (getattr(config, name, None) for name in _POSITION_FIELDS)
    positions = next((int(number) for number in stated if number), NO_MAXIMUM)
    return positions - (config.pad_token_id + 1 if config.model_type in _AFTER_PADDING else 0)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part that computes hidden states of token ids, without the language head."""
    decoder: PreTrainedModel = model.get_decoder()
    if "input_ids" in inspect.signature(decoder.forward).parameters:
        return decoder
    return cast("PreTrainedModel", model.base_model)  # ModernBERT's decoder calls its head `decoder`


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in the order in which they are computed. Raises ModelError if the model has no such list."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in decoder_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(model).__name__} has no list of its {count} decoder layers, so a build can't pause between them. "
        "Leave between_layers out."
    )
