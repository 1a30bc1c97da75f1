"""A lossy disk tier: keys and values quantized to int8 or int4 by HQQ. Every item from it is marked as lossy."""

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
from kvmem.storage import Storage, manifest, opened, replacing, write_all
from kvmem.tiers.base import DiskStore

BITS = {"int8": 8, "int4": 4}
GROUP = 64
"""How many numbers share a scale and a zero point: keys of one channel, or at most so many values of one token."""
SCALE_BYTES = 8
"""A scale and a zero point, float32 each. The zero point is needed because keys of some models are far from 0."""


class QuantizedStore(DiskStore):
    """A disk tier whose files hold keys and values quantized by `scheme`. Items read from it are marked as lossy."""

    def __init__(self, backend: Backend, folder: Path, scheme: str) -> None:
        """Raises ConfigError if hqq is not installed, or for a model with a sliding window, states or latents."""
        if dynamic_cache.has_sliding_layers(backend.model_config) or backend.fingerprint.layout is not None:
            raise ConfigError(f"The tier 'disk_{scheme}' covers full attention only. Use 'disk', which is lossless.")
        _hqq()
        self.scheme = scheme
        super().__init__(backend, folder, QuantizedFile(scheme))

    def stored_metadata(self, metadata: KVCacheMetadata) -> KVCacheMetadata:
        return metadata.model_copy(update={"lossy": lossy_forms(metadata, self.scheme)})

    def nbytes(self, tokens: int, built_bytes: int) -> int:
        return quantized_bytes(self._backend.fingerprint, self.scheme, tokens)


def quantized_bytes(model: ModelFingerprint, scheme: str, tokens: int) -> int:
    """Bytes of quantized keys and values of `tokens`, with scales and zero points.

    For few tokens in bf16 this is more than unquantized.
    """
    rows = model.kv_heads * model.head_dim * _padded(tokens) // GROUP  # of GROUP keys each
    value_rows = rows * GROUP // _values_group(model.head_dim)
    packed = 2 * rows * GROUP * BITS[scheme] // 8
    return model.layers * (packed + (rows + value_rows) * SCALE_BYTES)


def lossy_forms(metadata: KVCacheMetadata, scheme: str) -> str:
    """The value of `lossy` after quantization by `scheme`: all schemes that the item went through, in order."""
    earlier = metadata.lossy.split(", ") if metadata.lossy else []
    return ", ".join(earlier if scheme in earlier else [*earlier, scheme])


class QuantizedFile(Storage):
    """One item as a safetensors file of integers, scales and zero points.

    Asymmetric quantization: keys in groups of 64 tokens of one channel, because outliers in keys stay in their channel,
    and values in groups of channels of one token (KIVI, Liu et al. 2024). The checksum covers manifest, names, shapes
    and bytes.
    """

    name = "quantized"
    suffixes = ()

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def dump(self, path: Path, items: Sequence[KVCacheItem]) -> None:
        (item,) = items
        if item.metadata.compaction is not None:
            raise StorageError(
                f"Item {item.kv_cache_id} is {item.metadata.lossy}, and the tier 'disk_{self.scheme}' quantizes "
                "memories with an entry for each token. Use 'disk'."
            )
        manifest.check_finite(item, path)
        tensors: dict[str, torch.Tensor] = {}
        for layer, (keys, values) in enumerate(dynamic_cache.layers_of(item.kv_cache)):
            for kind, tensor in (("k", keys), ("v", values)):
                tensors |= {f"{layer}.{kind}.{part}": data for part, data in self._quantized(kind, tensor).items()}
        metadata = item.metadata.model_copy(update={"lossy": lossy_forms(item.metadata, self.scheme)})
        text = manifest.to_json([KVCacheItem(item.kv_cache, metadata, item.kv_cache_id)])
        header = {"manifest": text, "scheme": self.scheme, "checksum": _checksum(text, tensors)}
        with replacing(path) as file:
            write_all(file, memoryview(safetensors.torch.save(tensors, header)))

    def load(
        self, path: Path, fingerprint: ModelFingerprint, config: PreTrainedConfig, device: torch.device
    ) -> list[KVCacheItem]:
        try:
            with opened(path), safetensors.safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dictionary
        except safetensors.SafetensorError as error:
            raise DamagedFileError(f"{path} is damaged ({error}). Build the memory again.") from error
        text = header.get("manifest", "")
        if header.get("scheme") != self.scheme or header.get("checksum") != _checksum(text, tensors):
            raise DamagedFileError(f"{path} is damaged: its checksum does not fit its content. Build the memory again.")
        contents = manifest.from_json(text, path)
        manifest.check_model(contents, fingerprint, path)
        if len(contents.items) != 1:
            raise DamagedFileError(f"{path} holds {len(contents.items)} items, and files of a tier hold one.")
        (entry,) = contents.items
        dtype = getattr(torch, fingerprint.dtype)
        shape = (1, fingerprint.kv_heads, entry.cache_tokens, fingerprint.head_dim)
        manifest.check_tensors(entry, [(dtype, shape)] * (2 * fingerprint.layers), fingerprint, config, path)
        self._check_parts(tensors, fingerprint, entry.cache_tokens, path)
        layers = [
            (
                self._dequantized(tensors, f"{layer}.k", shape, device).to(dtype),
                self._dequantized(tensors, f"{layer}.v", shape, device).to(dtype),
            )
            for layer in range(entry.layers)
        ]
        cache = dynamic_cache.from_layers(layers, config, entry.cache_tokens)
        return [KVCacheItem(cache, entry.metadata, entry.kv_cache_id)]

    def _check_parts(self, tensors: dict[str, torch.Tensor], model: ModelFingerprint, tokens: int, path: Path) -> None:
        """Raises DamagedFileError unless there are the integers, scales and zero points of so many tokens."""
        numbers, value_group = model.kv_heads * model.head_dim * _padded(tokens), _values_group(model.head_dim)
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for layer in range(model.layers):
            for kind, group in (("k", GROUP), ("v", value_group)):
                rows = numbers // group
                expected[f"{layer}.{kind}.q"] = torch.uint8, (rows * BITS[self.scheme] // 8, group)
                expected |= {f"{layer}.{kind}.{part}": (torch.float32, (rows, 1)) for part in "sz"}
        if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != expected:
            raise DamagedFileError(f"{path} does not hold the tensors of {tokens} tokens. Build the memory again.")
        if not all(manifest.is_finite(tensor) for tensor in tensors.values() if tensor.dtype == torch.float32):
            raise DamagedFileError(f"{path} holds scales that are NaN or infinite. Build the memory again.")

    def _quantized(self, kind: str, tensor_BHTD: torch.Tensor) -> dict[str, torch.Tensor]:
        padding = -tensor_BHTD.shape[2] % GROUP
        padded = torch.cat([tensor_BHTD, tensor_BHTD[:, :, -1:].expand(-1, -1, padding, -1)], dim=2).float()
        rows_RG = padded.mT.reshape(-1, GROUP) if kind == "k" else padded.reshape(-1, _values_group(padded.shape[-1]))
        packed, meta = _hqq().quantize(
            rows_RG,
            nbits=BITS[self.scheme],
            group_size=rows_RG.shape[1],
            axis=1,
            optimize=False,
            compute_dtype=torch.float32,
            device=str(rows_RG.device),
        )
        return {"q": packed.cpu().contiguous(), "s": meta["scale"].cpu(), "z": meta["zero"].cpu()}

    def _dequantized(
        self, tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, int, int, int], device: torch.device
    ) -> torch.Tensor:
        packed, scale, zero = (tensors[f"{name}.{part}"].to(device) for part in "qsz")
        hqq, bits = _hqq(), BITS[self.scheme]
        batch, heads, tokens, dim = shape
        group = GROUP if name.endswith("k") else _values_group(dim)
        packing = hqq.bit_to_packing[bits]
        rows_RG: torch.Tensor = hqq.dequantize(
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


def _padded(tokens: int) -> int:
    """`tokens`, filled up to whole groups of keys."""
    return -(-tokens // GROUP) * GROUP


def _values_group(head_dim: int) -> int:
    return math.gcd(head_dim, GROUP)


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_hqq() -> None:
    """Raises ConfigError if hqq is not installed."""
    _hqq()


def _hqq() -> Any:
    """HQQ's quantizer (Badri & Shaji 2023), used without its optimization. Imported lazily, because few need it."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise ConfigError(
            f"A quantized tier needs hqq ({error}). pip install 'kvmem[compressed]', or use the tier 'disk'."
        ) from error
    return Quantizer
