"""Files in the host memory of one rank, which holds its own heads of each; used in a worker. Does not import vLLM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvmem.cache import KEYS, VALUES, ModelFingerprint
from kvmem.engines.vllm.connector.file_reads import FileReads, Read
from kvmem.engines.vllm.connector.host_memory import Extent, HostMemory
from kvmem.engines.vllm.connector.protocol import FileState, file_path
from kvmem.errors import EngineError, FingerprintError, StorageError
from kvmem.storage import ItemReader, ProcessReader, ThreadReader, opened_item

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass
class HeldFile:
    """A file in host memory: this rank's heads of it."""

    extent: Extent
    shape: tuple[int, int, int] = (0, 0, 0)
    """Of the keys of a layer and of its values, which are behind them: (heads of this rank, tokens, head_dim)."""

    def layer(self, number: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Keys and values of a layer, (2, tokens, heads, head_dim), on `device`, with the strides of the file."""
        nbytes = 2 * math.prod(self.shape) * dtype.itemsize
        raw = self.extent.tensor(number * nbytes, (number + 1) * nbytes, device)
        return raw.view(dtype).view(2, *self.shape).transpose(1, 2)


def reader_for(memory: HostMemory, bytes_per_s: float | None) -> ThreadReader:
    """What reads files into the memory: a process of its own where the system allows it."""
    if memory.block is None or memory.block.shared.descriptor < 0:
        return ThreadReader(bytes_per_s)
    return ProcessReader(memory.block.shared, bytes_per_s, populate=memory.pinned)


class HeldFiles:
    """Reads files, as the scheduler orders it, and holds them until it has them dropped."""

    def __init__(
        self,
        folder: Path,
        fingerprint: ModelFingerprint,
        config: PreTrainedConfig,
        rank: int,
        ranks: int,
        memory: HostMemory,
        reader: ThreadReader,
    ) -> None:
        self.folder, self.fingerprint, self.config = folder, fingerprint, config
        self.heads = max(fingerprint.stored_kv_heads // ranks, 1)
        self.first_head = rank * fingerprint.stored_kv_heads // ranks
        """This rank's heads. With more ranks than heads, adjacent ranks have the same head."""
        self.memory = memory
        self.held: dict[FileState, HeldFile] = {}
        """Files in host memory, or on their way there."""
        self.reader = reader
        self.reads = FileReads(self._read)

    def start(self, read: Read) -> None:
        """Starts to read a file. `reads` tells when it has ended."""
        try:
            self.held[read.key] = HeldFile(self.memory.take(read.nbytes))
        except EngineError as error:
            self.reads.fail(read, str(error))
        else:
            self.reads.start(read, self.held[read.key].extent)

    def drop(self, key: FileState) -> None:
        """Frees the memory of a file whose read has ended. No copy from it may be under way."""
        held = self.held.pop(key, None)
        if held is not None:
            self.memory.give_back(held.extent)

    def stop(self) -> None:
        """Ends the reads, and unpins the memory. No copy from it may be under way."""
        self.reader.stop()
        self.reads.stop()
        self.memory.close()

    def _read(self, read: Read, memory: Extent) -> None:
        """Reads this rank's heads of a file, on a thread of its own. Raises StorageError or FingerprintError."""
        path = file_path(self.folder, read.key[0])
        with opened_item(path, self.fingerprint, self.config) as item:
            if item.header.checksum != read.checksum:
                raise StorageError(f"{path} was replaced by another file while it was about to be read. Ask again.")
            tokens, head_dim = self._size_of(item, path)
            head_bytes = tokens * head_dim * item.dtypes[0].itemsize
            rank_bytes = self.heads * head_bytes
            if rank_bytes * len(item.starts) > memory.starts[-1]:
                raise StorageError(f"{path} was replaced by a larger file while it was about to be read. Ask again.")
            targets = []
            for number, start in enumerate(item.starts):
                at = number * rank_bytes
                targets += memory.targets(at, at + rank_bytes, start + self.first_head * head_bytes)
            whole = memory.block.shared.map
            self.reader.read(path, item.file, item.regions(targets), whole)
            item.finish(targets, memoryview(whole))
            self.held[read.key].shape = self.heads, tokens, head_dim

    def _size_of(self, item: ItemReader, path: Path) -> tuple[int, int]:
        """Tokens and head size of a file. Raises FingerprintError unless every layer keeps keys and values of all heads
        and all tokens."""
        tokens = item.entry.cache_tokens
        for number, shape in enumerate(item.shapes):
            if len(shape) == 4 and shape[2] < tokens:
                raise FingerprintError(
                    f"Layer {number // 2} of {path.name} holds the last {shape[2]} of {tokens} tokens: it has a "
                    "sliding window, and an engine built the memory that keeps no more. vLLM needs all. Extract the "
                    "memory again with vLLM."
                )
        usual = self.fingerprint.layers == item.entry.layers and set(item.entry.names) == {(KEYS, VALUES)}
        if not usual or len({*item.shapes, (1, self.fingerprint.stored_kv_heads, tokens, item.shapes[0][-1])}) != 1:
            raise FingerprintError(
                f"{path} does not hold keys and values of {self.fingerprint.stored_kv_heads} heads in each of "
                f"{self.fingerprint.layers} layers, which this engine injects. Extract its memory on this engine."
            )
        return tokens, item.shapes[0][-1]
