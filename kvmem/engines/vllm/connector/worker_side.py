"""The worker's half: transfers keys and values between files and the engine's blocks, on one tensor-parallel rank."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from kvmem.cache import KEYS, VALUES, KVCacheItem, ModelFingerprint, dynamic_cache
from kvmem.engines.vllm.connector.block_layouts import Layout, layout_for
from kvmem.engines.vllm.connector.file_reads import FileReads, Read, Throttle
from kvmem.engines.vllm.connector.host_memory import Extent, HostMemory
from kvmem.engines.vllm.connector.protocol import FileState, file_path, part_name
from kvmem.engines.vllm.connector.scheduler_side import Outcomes, Transfer, Transfers
from kvmem.errors import FingerprintError, StorageError
from kvmem.storage import ItemManifest, ItemReader, SafetensorsFile, opened_item

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import VllmConfig

CPU = torch.device("cpu")
LONGEST_IDLE_S = 0.002
"""How long an engine that has nothing to compute waits for a read before it looks for new requests."""


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


class WorkerSide:
    """Loads and saves the files of each step. One for each worker process."""

    def __init__(
        self,
        folder: Path,
        fingerprint: ModelFingerprint,
        config: VllmConfig,
        rank: int,
        host_pages: int,
        read_bytes_per_s: float | None = None,
    ) -> None:
        """host_pages: host memory for files, in pages of `host_memory`."""
        self.folder = folder
        self.fingerprint = fingerprint
        self.vllm_config = config
        self.model_config: PreTrainedConfig = config.model_config.hf_text_config
        self.rank, self.ranks = rank, config.parallel_config.tensor_parallel_size
        self.heads = max(fingerprint.stored_kv_heads // self.ranks, 1)
        self.first_head = rank * fingerprint.stored_kv_heads // self.ranks
        """This rank's heads. With more ranks than heads, adjacent ranks have the same head."""
        self.host_pages = host_pages
        self.held: dict[FileState, HeldFile] = {}
        """Files in host memory, or on their way there."""
        self.reads = FileReads(self._read, Throttle(read_bytes_per_s))
        self.outcomes = Outcomes()
        self.failed_blocks: set[int] = set()
        self.loaded: dict[str, torch.cuda.Event] = {}
        """By layer, the end of its loads that the forward pass has not waited for yet."""

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Takes the engine's caches, by layer name."""
        self.caches = dict(sorted(caches.items(), key=lambda entry: extract_layer_index(entry[0])))
        self.layout: Layout = layout_for(caches, self.vllm_config)
        cache = next(iter(caches.values()))
        self.device = cache.device
        on_gpu = self.device.type == "cuda"
        self.modules: dict[str, Any] = self.vllm_config.compilation_config.static_forward_context
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        # Layers wait for their own KV only if they run one by one, which they do not in one graph of the whole forward.
        mixed = self.vllm_config.compilation_config.cudagraph_mode.mixed_mode()
        self.layer_by_layer = mixed.name != "FULL" and self.vllm_config.speculative_config is None
        self.memory = HostMemory(self.host_pages, pinned=on_gpu)

    def load(self, transfers: Transfers) -> None:
        """Injects this step's files from host memory, and starts to read those that are still to come there.

        On a GPU the copies overlap with the forward pass: `wait_for_layer` makes each layer wait for its own copies. A
        step that may replay one graph for all layers waits for all copies first.
        """
        for key in transfers.drops:  # earlier steps' copies from it have ended: those steps waited for them
            held = self.held.pop(key, None)
            if held is not None:
                self.memory.give_back(held.extent)
        for read in transfers.reads:
            self.held[read.key] = HeldFile(self.memory.take(read.nbytes))
            self.reads.start(read, self.held[read.key].extent)
        ready = []
        for transfer in transfers.loads:
            held = None if transfer.key is None else self.held.get(transfer.key)
            if held is not None:
                ready.append((held, transfer))
            else:  # the scheduler has it injected only after this rank has reported it
                self.outcomes.failed_loads[transfer.request_id] = f"{transfer.name} is not in host memory."
                size = self.layout.block_size
                self.failed_blocks.update(transfer.block_ids[transfer.start // size : -(-transfer.end // size)])
        if not ready:
            return
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            slots = [self._slots(transfer) for _, transfer in ready]
            for layer, (name, cache) in enumerate(self.caches.items()):
                for (held, transfer), at in zip(ready, slots, strict=True):
                    whole_2THD = held.layer(layer, cache.dtype, self.device)
                    keys_THD, values_THD = whole_2THD[:, transfer.start : transfer.end]
                    self.layout.write(cache, self.modules[name], (keys_THD, values_THD), at)
                if self.stream is not None:
                    self.loaded[name] = self.stream.record_event()
        if not (transfers.prefills and self.layer_by_layer):
            self.wait_for_all()

    def wait_for_layer(self, name: str) -> None:
        """Makes the forward pass wait for the loads of one layer."""
        event = self.loaded.pop(name, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def wait_for_all(self) -> None:
        """Makes the forward pass wait for the loads of all layers."""
        for name in list(self.loaded):
            self.wait_for_layer(name)

    def save(self, transfers: Transfers) -> None:
        """Writes this step's files. Each rank writes its own heads."""
        self.wait_for_all()
        for transfer in transfers.saves:
            if transfer.request_id in self.outcomes.failed_loads:
                continue  # its first tokens are computed again, and then it is saved
            try:
                path = file_path(self.folder, part_name(transfer.name, self.rank, self.ranks))
                SafetensorsFile().dump(path, [self._item(transfer)])
            except StorageError as error:
                self.outcomes.failed_saves[transfer.request_id] = str(error)
            else:
                self.outcomes.saved.add(transfer.request_id)

    def take_failed_blocks(self) -> set[int]:
        """Ids of the blocks whose loads have failed since the last call."""
        failed, self.failed_blocks = self.failed_blocks, set()
        return failed

    def wait_for_reads(self) -> None:
        """Waits a moment for a read to end, if any is under way."""
        self.reads.wait(LONGEST_IDLE_S)

    def take_outcomes(self) -> Outcomes | None:
        """The outcomes since the last call; None if there are none."""
        outcomes, self.outcomes = self.outcomes, Outcomes()
        outcomes.reads = self.reads.take_done()
        return outcomes if outcomes != Outcomes() else None

    def stop(self) -> None:
        """Ends what runs on threads."""
        self.reads.stop()

    def _read(self, read: Read, memory: Extent, throttle: Throttle) -> None:
        """Reads this rank's heads of a file, on a thread of its own. Raises StorageError or FingerprintError."""
        path = file_path(self.folder, read.key[0])
        with opened_item(path, self.fingerprint, self.model_config) as item:
            if item.header.checksum != read.checksum:
                raise StorageError(f"{path} was replaced by another file while it was about to be read. Ask again.")
            tokens, head_dim = self._size_of(item, path)
            head_bytes = tokens * head_dim * item.dtypes[0].itemsize
            rank_bytes = self.heads * head_bytes
            if rank_bytes * len(item.starts) > memory.starts[-1]:
                raise StorageError(f"{path} was replaced by a larger file while it was about to be read. Ask again.")
            targets = []
            for number, start in enumerate(item.starts):
                first, at = start + self.first_head * head_bytes, number * rank_bytes
                targets += [(first + part - at, view) for part, view in memory.memory(at, at + rank_bytes)]
            item.read(targets, throttle.wait)
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
        usual = len(self.caches) == item.entry.layers and set(item.entry.names) == {(KEYS, VALUES)}
        if not usual or len({*item.shapes, (1, self.fingerprint.stored_kv_heads, tokens, item.shapes[0][-1])}) != 1:
            raise FingerprintError(
                f"{path} does not hold keys and values of {self.fingerprint.stored_kv_heads} heads in each of "
                f"{len(self.caches)} layers, which this engine injects. Extract its memory on this engine."
            )
        return tokens, item.shapes[0][-1]

    def _slots(self, transfer: Transfer) -> torch.Tensor:
        """The slots of the transfer's tokens, copied to the device once for all layers, without waiting for it."""
        slots = self.layout.slots(torch.tensor(transfer.block_ids), transfer.start, transfer.end)
        return slots if self.stream is None else slots.pin_memory().to(self.device, non_blocking=True)

    def _item(self, transfer: Transfer) -> KVCacheItem:
        """The item to save: this rank's heads of the transfer's tokens."""
        size = self.layout.block_size
        blocks = torch.tensor(transfer.block_ids[: -(-transfer.end // size)], device=self.device)
        layers = []
        for name, cache in self.caches.items():
            keys_THD, values_THD = self.layout.read(cache, self.modules[name], blocks, transfer.end)
            # Copied to the host layer by layer: a GPU may lack memory for a second copy of all layers.
            keys_BHTD, values_BHTD = (tensor.to(CPU).transpose(0, 1)[None] for tensor in (keys_THD, values_THD))
            layers.append((keys_BHTD.contiguous(), values_BHTD.contiguous()))
        entry = ItemManifest.model_validate_json(transfer.item)
        metadata = entry.metadata.model_copy(update={"fingerprint": self.fingerprint})  # whatever the client says
        return KVCacheItem(dynamic_cache.from_layers(layers, self.model_config), metadata, entry.kv_cache_id)
