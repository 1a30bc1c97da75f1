"""The worker's half: transfers keys and values between files and the engine's blocks, on one tensor-parallel rank."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from kvmem.cache import KVCacheItem, ModelFingerprint, dynamic_cache
from kvmem.engines.vllm.connector.background_saves import BackgroundSaves
from kvmem.engines.vllm.connector.block_layouts import Layout, layout_for
from kvmem.engines.vllm.connector.held_files import HeldFiles, reader_for
from kvmem.engines.vllm.connector.host_memory import HostMemory
from kvmem.engines.vllm.connector.protocol import file_path, part_name
from kvmem.engines.vllm.connector.transfers import Outcomes, Transfer, Transfers
from kvmem.errors import StorageError
from kvmem.storage import ItemManifest, SafetensorsFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import VllmConfig

CPU = torch.device("cpu")
LONGEST_IDLE_S = 0.002
"""How long an engine that has nothing to compute waits for a read before it looks for new requests."""


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
        self.host_pages = host_pages
        self.read_bytes_per_s = read_bytes_per_s
        self.outcomes = Outcomes()
        self.background = BackgroundSaves()
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
        memory = HostMemory(self.host_pages, pinned=on_gpu)
        self.files = HeldFiles(
            self.folder,
            self.fingerprint,
            self.model_config,
            self.rank,
            self.ranks,
            memory,
            reader_for(memory, self.read_bytes_per_s),
        )

    def load(self, transfers: Transfers) -> None:
        """Injects this step's files from host memory, and starts to read those that are still to come there.

        On a GPU the copies overlap with the forward pass: `wait_for_layer` makes each layer wait for its own copies. A
        step that may replay one graph for all layers waits for all copies first.
        """
        if transfers.drops and self.stream is not None:
            self.stream.synchronize()  # earlier steps' copies have ended as a rule: those steps waited for them
        for key in transfers.drops:
            self.files.drop(key)
        for read in transfers.reads:
            self.files.start(read)
        ready = []
        for transfer in transfers.loads:
            held = None if transfer.key is None else self.files.held.get(transfer.key)
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
        for transfer in transfers.background_saves:
            self._save_in_background(transfer)

    def take_failed_blocks(self) -> set[int]:
        """Ids of the blocks whose loads have failed since the last call."""
        failed, self.failed_blocks = self.failed_blocks, set()
        return failed

    def wait_for_reads(self) -> None:
        """Waits a moment for a read to end, if any is under way."""
        self.files.reads.wait(LONGEST_IDLE_S)

    def take_outcomes(self) -> Outcomes | None:
        """The outcomes since the last call; None if there are none."""
        outcomes, self.outcomes = self.outcomes, Outcomes()
        outcomes.reads = self.files.reads.take_done()
        outcomes.background_saves = self.background.take_done()
        return outcomes if outcomes != Outcomes() else None

    def stop(self) -> None:
        """Ends what runs on threads and in other processes."""
        if self.stream is not None:
            self.stream.synchronize()
        self.files.stop()
        self.background.stop()

    def _save_in_background(self, transfer: Transfer) -> None:
        """Copies and writes blocks that this step has filled. The scheduler keeps them until they are copied."""
        size = self.layout.block_size
        if self.failed_blocks.intersection(transfer.block_ids[: -(-transfer.end // size)]):
            self.background.fail(transfer.name, "A load of its first blocks failed.")
            return
        filled = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
        path = file_path(self.folder, part_name(transfer.name, self.rank, self.ranks))

        def copied() -> KVCacheItem:
            with torch.inference_mode():
                if filled is None:
                    return self._item(transfer)
                stream = torch.cuda.Stream(self.device)
                stream.wait_event(filled)
                with torch.cuda.device(self.device), torch.cuda.stream(stream):
                    return self._item(transfer)

        self.background.start(transfer.name, copied, lambda item: SafetensorsFile().dump(path, [item]))

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
