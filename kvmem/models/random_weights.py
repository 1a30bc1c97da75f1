"""Random weights of a shape from a seed, on one device or sharded over ranks with the same values."""

from __future__ import annotations

import os
import warnings

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

from kvmem.errors import ModelError

STD = 0.02
"""Standard deviation of the weights."""


@torch.no_grad()
def filled(model: PreTrainedModel, device: torch.device, seed: int) -> PreTrainedModel:
    """Moves a model from the meta device to `device` and fills it with seeded random weights.

    Raises ModelError if the weights are larger than the memory of the device.
    """
    _check_memory(model, device)
    model = model.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, generator)
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(model.config).to(device)  # its buffers are not parameters
    model.tie_weights()
    return model


@torch.no_grad()
def share(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """This rank's shard, under torchrun, of the weights that `filled` makes on one device of the same type.

    Each rank generates one whole tensor at a time and keeps its shard, so no device holds the whole model.
    """
    with torch.device("meta"):
        model_class: type[PreTrainedModel] = type(AutoModelForCausalLM.from_config(config))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would list every weight as missing
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "DTensor random operators")  # from its own initialization
            model: PreTrainedModel = model_class.from_pretrained(
                None,
                config=config,
                state_dict={},
                dtype=dtype,
                attn_implementation=config._attn_implementation,
                distributed_config=DistributedConfig(tp_plan="auto"),
            )
    finally:
        logging.set_verbosity(verbosity)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            whole = torch.empty(parameter.shape, dtype=dtype, device=model.device)
            _fill(name, whole, generator)
            shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
        else:
            _fill(name, parameter, generator)
    model.eval()
    return model


def _check_memory(model: PreTrainedModel, device: torch.device) -> None:
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if device.type == "cuda":
        _, available = torch.cuda.mem_get_info(device)
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise ModelError(
            f"The weights take {needed / 1e9:.0f} GB in {str(model.dtype).removeprefix('torch.')}, and {device} has "
            f"{available / 1e9:.0f} GB. Use a smaller model or dtype, or an engine that shards it over devices "
            "(hf_ranks, vllm)."
        )


def _fill(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    if "norm" in name:
        weight.fill_(1.0)
    else:
        weight.normal_(0.0, STD, generator=generator)
