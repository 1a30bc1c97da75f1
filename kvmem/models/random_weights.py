"""Random weights of a shape, from a seed: on one device, or on ranks, each of which keeps its share of the same."""

from __future__ import annotations

import os
import warnings

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from kvmem.errors import ModelError

STD = 0.02


@torch.no_grad()
def filled(model: PreTrainedModel, device: torch.device, seed: int) -> PreTrainedModel:
    """A model on the meta device with seeded weights, on `device`. Raises ModelError where they can't fit there."""
    _check_room(model, device)
    model = model.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, generator)
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(model.config).to(device)  # its buffers are not among the parameters
    model.tie_weights()
    return model


@torch.no_grad()
def share(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """This rank's share, under torchrun, of the weights that `filled` makes on one such device.

    Each rank makes one whole tensor after the other and keeps its part, so no device has to hold the whole model.
    """
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers lists every weight that it was not given
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "DTensor random operators")  # it fills them too, and for nothing
            model = kind.from_pretrained(
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
            mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(mine.to_local())
        else:
            _fill(name, parameter, generator)
    return model.eval()


def _check_room(model: PreTrainedModel, device: torch.device) -> None:
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if device.type == "cuda":
        _, room = torch.cuda.mem_get_info(device)
    else:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > room:
        raise ModelError(
            f"The weights take {needed / 1e9:.0f} GB in {str(model.dtype).removeprefix('torch.')}, and {device} has "
            f"{room / 1e9:.0f} GB. Use a smaller model or dtype, or an engine that shares it among devices (hf_ranks, "
            "vllm)."
        )


def _fill(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    if "norm" in name:
        weight.fill_(1.0)
    else:
        weight.normal_(0.0, STD, generator=generator)
