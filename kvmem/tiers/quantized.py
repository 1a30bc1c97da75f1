"""A compressed tier: keys and values as int8 or int4, by HQQ. It is lossy, and every item from there says so."""

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

from kvmem.cache import KVCacheItem, KVCacheMetadata, ModelFingerprint, dynamic_cache
from kvmem.engines import Backend
from kvmem.errors import ConfigError, DamagedFileError, StorageError
from kvmem.storage import Storage, manifest, replacing, write_all
from kvmem.tiers.base import DiskStore

BITS = {"int8": 8, "int4": 4}
GROUP = 64
"""Tokens of a channel whose keys share a scale and a zero point; and at most so many channels of a token's values."""
SCALE_BYTES = 8
"""A scale and a zero point, float32 each: keys of some models stand far from 0."""


class QuantizedStore(DiskStore):
    """A disk tier whose files hold `scheme` in place of the numbers that were built; what is read is marked lossy."""

    def __init__(self, backend: Backend, folder: Path, scheme: str) -> None:
        """Raises ConfigError where hqq is missing, or for a model with a sliding window."""
        if dynamic_cache.has_sliding_layers(backend.model_config):
            raise ConfigError(f"The tier 'disk_{scheme}' covers full attention only. Use 'disk', which loses nothing.")
        _hqq()
        self.scheme = scheme
        super().__init__(backend, folder, QuantizedFile(scheme))

    def marked(self, metadata: KVCacheMetadata) -> KVCacheMetadata:
        return metadata.model_copy(update={"lossy": lossy(metadata, self.scheme)})

    def nbytes(self, tokens: int, built_bytes: int) -> int:
        return quantized_bytes(self._backend.fingerprint, self.scheme, tokens)


def quantized_bytes(is_of: ModelFingerprint, scheme: str, tokens: int) -> int:
    """Of keys and values of `tokens`, scales and zero points too. Few tokens in bf16 take more than as they are."""
    rows = is_of.kv_heads * is_of.head_dim * (-(-tokens // GROUP))  # of GROUP keys each
    value_rows = rows * GROUP // _values_group(is_of.head_dim)
    packed = 2 * rows * GROUP * BITS[scheme] // 8
    return is_of.layers * (packed + (rows + value_rows) * SCALE_BYTES)


def lossy(metadata: KVCacheMetadata, scheme: str) -> str:
    """The mark of an item that goes through `scheme`: all that it has been through, in order."""
    been_through = metadata.lossy.split(", ") if metadata.lossy else []
    return ", ".join(been_through if scheme in been_through else [*been_through, scheme])


class QuantizedFile(Storage):
    """One item as a safetensors file of integers, scales and zero points.

    Asymmetric: keys in groups of 64 tokens of a channel, since what sticks out in them keeps to its channel, and values
    in groups of a token's channels (KIVI, Liu et al. 2024). The checksum is over manifest, names, shapes and bytes.
    """

    name = "compressed"
    suffixes = ()

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        (item,) = items
        tensors: dict[str, torch.Tensor] = {}
        for layer, (keys, values) in enumerate(dynamic_cache.layers_of(item.kv_cache)):
            for kind, tensor in (("k", keys), ("v", values)):
                tensors |= {f"{layer}.{kind}.{part}": kept for part, kept in self._compressed(kind, tensor).items()}
        mark = item.metadata.model_copy(update={"lossy": lossy(item.metadata, self.scheme)})
        text = manifest.to_json([KVCacheItem(item.kv_cache, mark, item.kv_cache_id)])
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
        contents = manifest.from_json(text, path)
        manifest.check_model(contents, fingerprint, path)
        (entry,) = contents.items
        dtype = getattr(torch, fingerprint.dtype)
        shape = (1, fingerprint.kv_heads, entry.cache_tokens, fingerprint.head_dim)
        layers = [
            (
                self._restored(tensors, f"{layer}.k", shape, device).to(dtype),
                self._restored(tensors, f"{layer}.v", shape, device).to(dtype),
            )
            for layer in range(entry.layers)
        ]
        cache = dynamic_cache.from_layers(layers, config, entry.cache_tokens)
        return [KVCacheItem(cache, entry.metadata, entry.kv_cache_id)]

    def _compressed(self, kind: str, tensor_BHTD: torch.Tensor) -> dict[str, torch.Tensor]:
        missing = -tensor_BHTD.shape[2] % GROUP
        whole = torch.cat([tensor_BHTD, tensor_BHTD[:, :, -1:].expand(-1, -1, missing, -1)], dim=2).float()
        rows_RG = whole.mT.reshape(-1, GROUP) if kind == "k" else whole.reshape(-1, _values_group(whole.shape[-1]))
        packed, known = _hqq().quantize(
            rows_RG,
            nbits=BITS[self.scheme],
            group_size=rows_RG.shape[1],
            axis=1,
            optimize=False,
            compute_dtype=torch.float32,
            device=str(rows_RG.device),
        )
        return {"q": packed.cpu().contiguous(), "s": known["scale"].cpu(), "z": known["zero"].cpu()}

    def _restored(
        self, tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, int, int, int], device: torch.device
    ) -> torch.Tensor:
        packed, scale, zero = (tensors[f"{name}.{part}"].to(device) for part in "qsz")
        hqq, bits = _hqq(), BITS[self.scheme]
        batch, heads, tokens, dim = shape
        group = GROUP if name.endswith("k") else _values_group(dim)
        packing = hqq.bit_to_packing[bits]
        rows_RG = hqq.dequantize(
            packed,
            {
                "nbits": bits,
                "group_size": group,
                "shape": (scale.shape[0], group),
                "scale": scale,
                "zero": zero,
                "axis": 1,
                "packing": packing,
                "unpack_view_dtype": hqq.unpack_view_dtype[packing],
                "view_as_float": False,
                "compute_dtype": torch.float32,
            },
        )
        if name.endswith("k"):
            return rows_RG.reshape(batch, heads, dim, -1).mT[:, :, :tokens].contiguous()
        return rows_RG.reshape(batch, heads, -1, dim)[:, :, :tokens].contiguous()


def _values_group(head_dim: int) -> int:
    return math.gcd(head_dim, GROUP)


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_hqq() -> None:
    """Raises ConfigError where hqq is missing."""
    _hqq()


def _hqq() -> Any:
    """HQQ's quantizer (Badri & Shaji 2023), without its search: imported where it is wanted, for few need it."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise ConfigError(
            f"A compressed tier needs hqq ({error}). pip install 'kvmem[compressed]', or use the tier 'disk'."
        ) from error
    return Quantizer
