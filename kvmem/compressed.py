"""A compressed tier: keys and values as int8 or int4, by torchao. It is lossy, and every item from there says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash
from transformers import PreTrainedConfig

from kvmem import dynamic_cache
from kvmem.backends import Backend
from kvmem.errors import ConfigError, DamagedFileError, StorageError
from kvmem.fingerprint import ModelFingerprint
from kvmem.items import KVCacheItem, KVCacheMetadata
from kvmem.places import DiskPlace
from kvmem.storage import Storage, manifest
from kvmem.storage.atomic import replacing, write_all

BITS = {"int8": 8, "int4": 4}
GROUP = 64
"""Numbers that share a scale and a zero point."""
GROUP_BYTES = 3
"""A scale as float16, a zero point of one byte."""


class CompressedPlace(DiskPlace):
    """A disk tier whose files hold `scheme` in place of the numbers that were built; what is read is marked lossy."""

    def __init__(self, backend: Backend, folder: Path, scheme: str) -> None:
        """Raises ConfigError where torchao is missing, or for a model with a sliding window."""
        if dynamic_cache.has_sliding_layers(backend.model_config):
            raise ConfigError(f"The tier 'disk_{scheme}' covers full attention only. Use 'disk', which loses nothing.")
        _torchao()
        self.scheme = scheme
        super().__init__(backend, folder, CompressedFile(scheme))

    def marked(self, metadata: KVCacheMetadata) -> KVCacheMetadata:
        return metadata.model_copy(update={"lossy": lossy(metadata, self.scheme)})

    def nbytes(self, tokens: int, built_bytes: int) -> int:
        is_of, bits = self._backend.fingerprint, BITS[self.scheme]
        of_keys = -(-tokens // GROUP) * GROUP * is_of.head_dim
        of_values = tokens * is_of.head_dim
        groups = of_keys // GROUP + of_values // _values_group(is_of.head_dim)
        return is_of.layers * is_of.kv_heads * ((of_keys + of_values) * bits // 8 + groups * GROUP_BYTES)


def lossy(metadata: KVCacheMetadata, scheme: str) -> str:
    """The mark of an item that goes through `scheme`: all that it has been through, in order."""
    been_through = metadata.lossy.split(", ") if metadata.lossy else []
    return ", ".join(been_through if scheme in been_through else [*been_through, scheme])


class CompressedFile(Storage):
    """One item as a safetensors file of integers, scales and zero points.

    Asymmetric, in groups of 64: keys by channel over tokens, since what sticks out in them keeps to its channel, and
    values by token over channels (KIVI, Liu et al. 2024). The checksum is over manifest, names, shapes and bytes.
    """

    name = "compressed"
    suffixes = ()

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        (item,) = items
        tensors: dict[str, torch.Tensor] = {}
        for layer, (keys, values) in enumerate(dynamic_cache.layers_of(item.kv_cache)):
            for kind, tensor in (("k", _whole_groups(keys)), ("v", values)):
                parts = self._compressed(tensor, _block(kind, tensor))
                tensors |= {f"{layer}.{kind}.{part}": packed for part, packed in parts.items()}
        mark = item.metadata.model_copy(update={"lossy": lossy(item.metadata, self.scheme)})
        text = manifest.of_items([KVCacheItem(item.kv_cache, mark, item.kv_cache_id)])
        known = {"manifest": text, "scheme": self.scheme, "checksum": _checksum(text, tensors)}
        with replacing(path) as file:
            write_all(file, memoryview(safetensors.torch.save(tensors, known)))

    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        try:
            with safetensors.safe_open(path, "pt") as file:
                known = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        except OSError as error:
            raise StorageError(f"{path} can't be read ({error}). Build the memory again.") from error
        except safetensors.SafetensorError as error:
            raise DamagedFileError(f"{path} is damaged ({error}). Build the memory again.") from error
        text = known.get("manifest", "")
        if known.get("scheme") != self.scheme or known.get("checksum") != _checksum(text, tensors):
            raise DamagedFileError(f"{path} is damaged: its checksum does not fit its content. Build the memory again.")
        contents = manifest.read(text, path)
        manifest.check_model(contents, fingerprint, path)
        (entry,) = contents.items
        dtype = getattr(torch, fingerprint.dtype)
        shape = (1, fingerprint.kv_heads, entry.cache_tokens, fingerprint.head_dim)
        layers = [
            (self._restored(tensors, f"{layer}.k", shape, device).to(dtype),
             self._restored(tensors, f"{layer}.v", shape, device).to(dtype))
            for layer in range(entry.layers)
        ]  # fmt: skip
        cache = dynamic_cache.from_layers(layers, config, entry.cache_tokens)
        return [KVCacheItem(cache, entry.metadata, entry.kv_cache_id)]

    def _compressed(self, tensor_BHTD: torch.Tensor, block: tuple[int, ...]) -> dict[str, torch.Tensor]:
        ao, numbers = _torchao(), tensor_BHTD.float()
        integer, least, most = self._integers()
        scale, zero = ao.choose_qparams_affine(
            numbers, ao.MappingType.ASYMMETRIC, block, integer, least, most, scale_dtype=torch.float16
        )
        packed = ao.quantize_affine(numbers, block, scale.float(), zero, integer, least, most)
        if self.scheme == "int4":
            packed = packed[..., ::2] | packed[..., 1::2] << 4
        return {"q": packed.cpu().contiguous(), "s": scale.cpu(), "z": zero.to(integer).cpu()}

    def _restored(
        self, tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        packed, scale, zero = (tensors[f"{name}.{part}"].to(device) for part in "qsz")
        if self.scheme == "int4":
            packed = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        block = _block(name[-1], packed)
        restored = _torchao().dequantize_affine(packed, block, scale.float(), zero.int(), *self._integers())
        return restored[:, :, : shape[2]].contiguous()

    def _integers(self) -> tuple[torch.dtype, int, int]:
        return (torch.int8, -128, 127) if self.scheme == "int8" else (torch.uint8, 0, 15)


def _whole_groups(keys_BHTD: torch.Tensor) -> torch.Tensor:
    """The keys, the last token's repeated until the tokens are a multiple of `GROUP`."""
    missing = -keys_BHTD.shape[2] % GROUP
    return torch.cat([keys_BHTD, keys_BHTD[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)


def _block(kind: str, tensor_BHTD: torch.Tensor) -> tuple[int, ...]:
    return (1, 1, GROUP, 1) if kind == "k" else (1, 1, 1, _values_group(tensor_BHTD.shape[-1]))


def _values_group(head_dim: int) -> int:
    return math.gcd(head_dim, GROUP)


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _torchao() -> Any:
    """torchao's quantization by itself: imported where it is wanted, for it takes a second and few need it."""
    try:
        from torchao.quantization import quant_primitives
    except ImportError as error:
        raise ConfigError(
            f"A compressed tier needs torchao ({error}). pip install 'kvmem[compressed]', or use the tier 'disk'."
        ) from error
    return quant_primitives
