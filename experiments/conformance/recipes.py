"""A tiny model with random weights of any causal language model that transformers lists."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from kvmem.models import loading

RECIPES = Path(__file__).parent / "recipes.yaml"
VOCABULARY = "vocab_size"  # raised as well where a family's own is smaller than the tokenizer's
GAIN = 12.0
"""By how much the weights are larger than transformers initializes them. Else a memory hardly affects an answer."""

NO_FIELDS = ("gain", "seed")
"""What a recipe says of the weights, not of the config."""


def architectures() -> list[str]:
    """The model types of transformers' own lists: causal language models, and vision-language models around one."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


@functools.cache
def _recipes() -> Any:
    return yaml.safe_load(RECIPES.read_text())


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A tiny config of the family: its own defaults, with the fields of `recipes.yaml` made small.

    Raises whatever the config class raises for values that don't fit together.
    """
    kind = CONFIG_MAPPING[model_type]
    family = _family(model_type).items()
    return kind(**_fields(kind, {name: value for name, value in family if name not in NO_FIELDS}))


def _family(model_type: str) -> Any:
    return _recipes()["families"].get(model_type, {})


def _fields(kind: type[PreTrainedConfig], family: Mapping[str, Any]) -> dict[str, Any]:
    default = kind()
    defaults = default.to_dict()
    fields: dict[str, Any] = {"pad_token_id": 0}
    for plain_name, value in _recipes()["small"].items():
        name = kind.attribute_map.get(plain_name, plain_name)
        if name in fields:
            continue
        if type(usual := defaults.get(name)) is int and (usual > value or name == VOCABULARY):
            fields[name] = value
    for name in kind.sub_configs:
        if isinstance(inside := getattr(default, name, None), PreTrainedConfig):
            fields[name] = {"model_type": inside.model_type, **_fields(type(inside), family.get(name, {}))}
    for name, value in family.items():
        if not isinstance(value, Mapping) or name not in kind.sub_configs:
            fields[name] = value
    return {name: value for name, value in fields.items() if value is not None}


def tiny_model(model_type: str, seed: int | None = None) -> PreTrainedModel:
    """The model of `tiny_config`, in fp32 on the CPU and in eval mode. Equal seeds give equal weights.

    seed: None takes the recipe's, which is 0 for most.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_family(model_type).get("seed", 0) if seed is None else seed)
        config = tiny_config(model_type)
        auto_class = loading.auto_class_of(config, model_type)
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32).eval()
    gain = _family(model_type).get("gain", GAIN)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
                module.weight.mul_(gain)
    return model
