"""The configuration of the backend `huggingface`."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvmem.engines.base import BackendConfig
from kvmem.errors import ConfigError, did_you_mean
from kvmem.models import loading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(config=ConfigDict(extra="forbid", protected_namespaces=()))
class HFConfig(BackendConfig):
    """The keys of `extractor_llm["config"]` for the backend `huggingface`."""

    backend: ClassVar[str] = "huggingface"

    model_name_or_path: str = loading.PACKAGED
    """A hub name, a local folder, `smollm2-135m`, or `random:<shape>`."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: float32 on a CPU and bfloat16 on a GPU."""
    attn_implementation: str = "sdpa"
    """transformers' name of the attention kernel, such as eager, sdpa or flash_attention_2."""
    tokenizer_name_or_path: str | None = None
    """None: the model's own, or for random weights the packaged model's."""
    seed: int = 0
    """Seed of random weights."""

    def __post_init__(self) -> None:
        try:
            if self.device != "auto":
                torch.device(self.device)
        except RuntimeError as error:
            choices = ["auto", "cpu", "cuda", "cuda:0", "cuda:1"]
            raise ConfigError(f"Unknown device {self.device!r}. {did_you_mean(self.device, choices)}") from error
        name, known = self.attn_implementation.removeprefix("paged|"), {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
        if name not in known and "/" not in name:  # with a slash it is the name of a kernel on the hub
            raise ConfigError(f"Unknown attn_implementation {name!r}. {did_you_mean(name, known)}")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError(f"Unknown dtype {self.dtype!r}. {did_you_mean(self.dtype, ['auto', *DTYPES])}")


def device_of(config: HFConfig) -> torch.device:
    """The device that `config` names. Raises ConfigError if this machine has no such GPU."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        has = f"{gpus} GPUs, numbered from cuda:0" if gpus else "no GPU"
        raise ConfigError(f"device={config.device}: this machine has {has}. Use device=auto or cpu.")
    return device
