"""Opened files in host memory, one rank's heads of each. An injection then only copies to the device."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvmem.cache import KV, ModelFingerprint, dynamic_cache
from kvmem.engines.vllm.connector.protocol import FileState, file_path, file_state
from kvmem.errors import FingerprintError
from kvmem.storage import SafetensorsFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CPU = torch.device("cpu")
PINNED_BYTES, PAGEABLE_BYTES = 8 << 30, 1 << 30
"""Default size: in pinned memory for a GPU engine; less for a CPU engine, as the page cache holds its files too."""


@dataclass
class HostCache:
    """Caches opened files. When `most_bytes` are full, the least recently used file is evicted.

    Each layer of a file is one tensor of shape (tokens, 2, kv_heads of this rank, head_dim), keys before values, so any
    range of tokens is one copy.
    """

    folder: Path
    fingerprint: ModelFingerprint
    config: PreTrainedConfig
    rank: int
    ranks: int
    dtype: torch.dtype
    pinned: bool
    most_bytes: int | None = None
    opened: OrderedDict[FileState, list[torch.Tensor]] = field(default_factory=OrderedDict)

    def layers(self, name: str) -> list[torch.Tensor]:
        """The layers of the file `name`. A file is read and its checksums verified when it is new to this worker.

        Raises StorageError for a missing or damaged file, and FingerprintError for a file of another model,
        or without the tokens that have left a sliding window.
        """
        path = file_path(self.folder, name)
        key = file_state(path)
        if key not in self.opened:
            for old in [old for old in self.opened if old[0] == name or not (self.folder / old[0]).exists()]:
                del self.opened[old]
            item = SafetensorsFile().load(path, self.fingerprint, self.config, CPU)[0]
            layers, tokens = dynamic_cache.layers_of(item.kv_cache), item.kv_cache.get_seq_length()
            for i, (keys, _) in enumerate(layers):
                if keys.shape[2] != tokens:
                    raise FingerprintError(
                        f"Layer {i} of {name} holds the last {keys.shape[2]} of {tokens} tokens: it has a sliding "
                        "window, and an engine built the memory that keeps no more. vLLM needs all. Extract the memory "
                        "again with vLLM."
                    )
            self.opened[key] = [self._own_heads(kv) for kv in layers]
            most = self.most_bytes or (PINNED_BYTES if self.pinned else PAGEABLE_BYTES)
            while len(self.opened) > 1 and sum(map(_nbytes, self.opened.values())) > most:
                self.opened.popitem(last=False)
        self.opened.move_to_end(key)
        return self.opened[key]

    def _own_heads(self, kv: KV) -> torch.Tensor:
        """This rank's heads of one stored layer. With more ranks than heads, adjacent ranks have the same head."""
        _, heads, tokens, head_dim = kv[0].shape
        count = max(heads // self.ranks, 1)
        first = self.rank * heads // self.ranks
        kv_T2HD = torch.empty(tokens, 2, count, head_dim, dtype=self.dtype, pin_memory=self.pinned)
        for i, tensor_BHTD in enumerate(kv):
            kv_T2HD[:, i] = tensor_BHTD[0, first : first + count].transpose(0, 1)
        return kv_T2HD


def _nbytes(layers: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in layers)
