"""The worker's half: moves keys and values between files and the engine's blocks, on one tensor-parallel rank."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from kvmem import dynamic_cache
from kvmem.backends.vllm_connector import part_name
from kvmem.backends.vllm_connector.layouts import Layout, layout_for
from kvmem.backends.vllm_connector.scheduling import Failures, Transfer, Transfers, file_path
from kvmem.errors import FingerprintError, StorageError
from kvmem.fingerprint import ModelFingerprint
from kvmem.items import KVCacheItem
from kvmem.storage.manifest import ItemManifest
from kvmem.storage.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import VllmConfig

CPU = torch.device("cpu")


class Moving:
    """One for each worker process."""

    def __init__(
        self, folder: Path, fingerprint: ModelFingerprint, config: VllmConfig, rank: int, host_bytes: int
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.vllm_config = config
        self.model_config: PreTrainedConfig = config.model_config.hf_text_config
        self.rank, self.ranks = rank, config.parallel_config.tensor_parallel_size
        self.host_bytes = host_bytes
        self.opened: OrderedDict[tuple[str, int, int], list[dynamic_cache.KV]] = OrderedDict()
        self.failures = Failures()
        self.failed_blocks: set[int] = set()
        self.arrived: dict[str, torch.cuda.Event] = {}

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """The engine's caches by layer name, in the order of the layers."""
        self.caches = dict(sorted(caches.items(), key=lambda entry: extract_layer_index(entry[0])))
        self.layout: Layout = layout_for(caches, self.vllm_config)
        self.device = next(iter(caches.values())).device
        self.modules: dict[str, Any] = self.vllm_config.compilation_config.static_forward_context
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def load(self, transfers: Transfers) -> None:
        """Injects this step's files. On a GPU the copies run beside the forward, layer by layer, and `wait_for_layer`
        holds a layer back until its own have arrived; a step of single tokens may replay one graph for all layers, so
        it waits for all."""
        ready = []
        for transfer in transfers.loads:
            try:
                ready.append((transfer, self._open(transfer.name)))
            except (StorageError, FingerprintError) as error:
                self.failures.loads[transfer.request_id] = str(error)
                size = self.layout.block_size
                self.failed_blocks.update(transfer.block_ids[transfer.start // size : -(-transfer.end // size)])
        if not ready:
            return
        if self.stream is None:
            for name in self.caches:
                self._write_layer(name, ready)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for name in self.caches:
                self._write_layer(name, ready)
                self.arrived[name] = self.stream.record_event()
        if not transfers.prefills:
            self.wait_for_all()

    def wait_for_layer(self, name: str) -> None:
        event = self.arrived.pop(name, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def wait_for_all(self) -> None:
        for name in list(self.arrived):
            self.wait_for_layer(name)

    def save(self, transfers: Transfers) -> None:
        """Writes this step's files: each rank its own heads."""
        self.wait_for_all()
        for transfer in transfers.saves:
            if transfer.request_id in self.failures.loads:
                continue  # its first tokens did not arrive; they are computed again, and then it is saved
            try:
                path = file_path(self.folder, part_name(transfer.name, self.rank, self.ranks))
                SafetensorsFile().dump(path, [self._item(transfer)])
            except StorageError as error:
                self.failures.saves[transfer.request_id] = str(error)

    def take_failed_blocks(self) -> set[int]:
        failed, self.failed_blocks = self.failed_blocks, set()
        return failed

    def take_failures(self) -> Failures | None:
        failures, self.failures = self.failures, Failures()
        return failures if failures.loads or failures.saves else None

    def _write_layer(self, name: str, ready: Sequence[tuple[Transfer, list[dynamic_cache.KV]]]) -> None:
        layer = list(self.caches).index(name)
        for transfer, layers in ready:
            blocks = torch.tensor(transfer.block_ids, device=self.device)
            slots = self.layout.slots(blocks, transfer.start, transfer.end)
            keys_THD, values_THD = (
                tensor[transfer.start : transfer.end].to(self.device, non_blocking=True) for tensor in layers[layer]
            )
            self.layout.write(self.caches[name], self.modules[name], (keys_THD, values_THD), slots)

    def _open(self, name: str) -> list[dynamic_cache.KV]:
        """A file's layers on the host, each (tokens, kv_heads of this rank, head_dim): checked whole when its content
        is new to this worker, then kept on hand up to `host_bytes`, pinned where there is a GPU."""
        path = file_path(self.folder, name)
        try:
            stat = path.stat()
        except OSError as error:
            raise StorageError(f"{path} can't be read ({error}). The memory it held was deleted.") from error
        key = (name, stat.st_ino, stat.st_mtime_ns)
        if key not in self.opened:
            for stale in [kept for kept in self.opened if kept[0] == name]:
                del self.opened[stale]
            item = SafetensorsFile().load(path, self.fingerprint, self.model_config, CPU)[0]
            layers = dynamic_cache.layers_of(item.kv_cache)
            self.opened[key] = [(self._own(keys), self._own(values)) for keys, values in layers]
            while len(self.opened) > 1 and sum(map(_nbytes, self.opened.values())) > self.host_bytes:
                self.opened.popitem(last=False)
        self.opened.move_to_end(key)
        return self.opened[key]

    def _own(self, tensor_BHTD: torch.Tensor) -> torch.Tensor:
        """This rank's heads of one stored tensor, tokens first. With more ranks than heads, neighbours share one."""
        heads = tensor_BHTD.shape[1]
        count = max(heads // self.ranks, 1)
        first = self.rank * heads // self.ranks
        own_THD = tensor_BHTD[0, first : first + count].transpose(0, 1)
        return own_THD.contiguous().pin_memory() if self.stream is not None else own_THD

    def _item(self, transfer: Transfer) -> KVCacheItem:
        size = self.layout.block_size
        blocks = torch.tensor(transfer.block_ids[: -(-transfer.end // size)], device=self.device)
        layers = []
        for name, cache in self.caches.items():
            keys_THD, values_THD = self.layout.read(cache, self.modules[name], blocks, transfer.end)
            layers.append((keys_THD.transpose(0, 1)[None].contiguous(), values_THD.transpose(0, 1)[None].contiguous()))
        entry = ItemManifest.model_validate_json(transfer.item)
        return KVCacheItem(dynamic_cache.from_layers(layers, self.model_config), entry.metadata, entry.kv_cache_id)


def _nbytes(layers: Sequence[dynamic_cache.KV]) -> int:
    return sum(tensor.numel() * tensor.element_size() for pair in layers for tensor in pair)
