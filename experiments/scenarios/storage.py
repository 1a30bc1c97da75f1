"""What do dump and load cost in time and memory, compared with torch.save + fsync and torch.load?"""

from __future__ import annotations

import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments.bench import Bench
from experiments.measurement import process_memory
from experiments.results import Payload, Row, between
from experiments.scenarios.base import ModelScenario
from kvmem import KVCacheItem
from kvmem import storage as formats
from kvmem.cache import KVCacheMetadata, MemoryTokens, dynamic_cache
from kvmem.storage import Storage

ITEMS = 8
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@plain_dataclass(frozen=True)
class StorageCell:
    """One file format."""

    label: str
    memory_filename: str


@plain_dataclass(frozen=True, kw_only=True)
class StoragePayload(Payload):
    """Median seconds of writing and reading the same tensors with this package and with torch."""

    name: ClassVar[str] = "storage"

    format: str
    kv_bytes: int
    dump_s: float
    torch_save_s: float
    dump_ratio: float
    """dump_s / torch_save_s."""
    load_s: float
    torch_load_s: float
    load_ratio: float
    dump_peak_extra_pct: float | None = None
    """The peak of anonymous memory during the step, above its level before, in percent of kv_bytes.

    None if the operating system does not report it.
    """
    torch_save_peak_extra_pct: float | None = None
    load_peak_extra_pct: float | None = None
    torch_load_peak_extra_pct: float | None = None
    dump_all_s: list[float]
    torch_save_all_s: list[float]
    load_all_s: list[float]
    torch_load_all_s: list[float]


@dataclass(config=ConfigDict(extra="forbid"))
class StorageScenario(ModelScenario[StorageCell]):
    """Writes and reads 8 items of random KV, of the model's shape, with this package and with torch.

    The order within a round is random. A write always creates a new file: the old one is removed, and the disk is
    synced first. A read finds the file in the page cache. Our load includes the checksum, which reads every page.
    torch.load copies every page and has no checksum. A first round, whose time does not count, warms up and measures
    memory.
    """

    gigabytes: float = Field(1.0, gt=0)
    """Size of all keys and values, in 10⁹ bytes."""
    repeats: int = Field(5, ge=1)
    folder: str = "outputs"
    """The folder of the files, on the disk to be measured. The files are removed afterwards."""

    measures_workload: ClassVar[bool] = False
    name: ClassVar[str] = "storage"
    question: ClassVar[str] = (
        "What do dump and load cost in time and memory, compared with torch.save + fsync and torch.load?"
    )

    def cells(self, bench: Bench) -> Sequence[StorageCell]:
        filename = bench.setup.storage.memory_filename
        return [StorageCell(formats.for_filename(filename).name, filename)]

    def measure(self, bench: Bench, cell: StorageCell) -> list[Row]:
        items = random_items(bench, int(self.gigabytes * 1e9), ITEMS)
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="kvmem-storage-", dir=self.folder) as folder:
            path = Path(folder) / cell.memory_filename
            comparison = _TorchComparison(bench, items, formats.for_filename(cell.memory_filename), path)
            peaks = comparison.peaks()
            rng = random.Random(bench.setup.seed)
            rounds = [comparison.seconds(rng) for _ in range(self.repeats)]
            equal = comparison.loads_the_same_bits()
        seconds = {name: median(times[name] for times in rounds) for name in rounds[0]}
        kv_bytes = sum(dynamic_cache.nbytes(item.kv_cache) for item in items)
        peak_pct = {name: 100 * peak / kv_bytes for name, peak in peaks.items()}
        payload = StoragePayload(
            format=cell.label,
            kv_bytes=kv_bytes,
            dump_s=seconds["dump"],
            torch_save_s=seconds["torch_save"],
            dump_ratio=seconds["dump"] / seconds["torch_save"],
            load_s=seconds["load"],
            torch_load_s=seconds["torch_load"],
            load_ratio=seconds["load"] / seconds["torch_load"],
            dump_peak_extra_pct=peak_pct.get("dump"),
            torch_save_peak_extra_pct=peak_pct.get("torch_save"),
            load_peak_extra_pct=peak_pct.get("load"),
            torch_load_peak_extra_pct=peak_pct.get("torch_load"),
            dump_all_s=[times["dump"] for times in rounds],
            torch_save_all_s=[times["torch_save"] for times in rounds],
            load_all_s=[times["load"] for times in rounds],
            torch_load_all_s=[times["torch_load"] for times in rounds],
        )
        ratios = {"dump": payload.dump_ratio, "load": payload.load_ratio}
        slower = [f"{step} is slower than torch's" for step, over in ratios.items() if over > 1]
        return [
            bench.row(
                self.name,
                arm=cell.label,
                tier="disk",
                context_tokens=items[0].metadata.token_count,
                query_tokens=0,
                memories=ITEMS,
                pairs=self.repeats,
                equality="bitwise" if equal else "diverged",
                verdict="ok" if equal else "invalid",
                verdict_reason="; ".join(slower) if equal else "the loaded tensors differ from the dumped ones",
                conditions=bench.conditions_now(),
                payload=payload,
            )
        ]

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        payloads = [row.payload for row in rows if isinstance(row.payload, StoragePayload)]
        dump = between([payload.dump_ratio for payload in payloads], " ×")
        load = between([payload.load_ratio for payload in payloads], " ×")
        return f"dump takes {dump} torch.save's time, load {load} torch.load's."


def random_items(bench: Bench, total_bytes: int, count: int) -> list[KVCacheItem]:
    """`count` items in RAM, with the shape and dtype of the bench's model, and about `total_bytes` in total."""
    fingerprint = bench.backend.fingerprint
    dtype = getattr(torch, fingerprint.dtype)
    token_bytes = 2 * fingerprint.layers * fingerprint.kv_heads * fingerprint.head_dim * dtype.itemsize
    tokens = max(1, total_bytes // (token_bytes * count))
    shape = (1, fingerprint.kv_heads, tokens, fingerprint.head_dim)
    generator = torch.Generator().manual_seed(bench.setup.seed)

    def draw() -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    items = []
    for i in range(count):
        cache = dynamic_cache.from_layers(
            [(draw(), draw()) for _ in range(fingerprint.layers)], bench.backend.model_config, tokens
        )
        ids = tuple(range(tokens))
        memory = MemoryTokens(source=f"random {i}", template="plain", token_ids=ids, header_tokens=0, body_end=tokens)
        kv_bytes = dynamic_cache.nbytes(cache)
        items.append(
            KVCacheItem(cache, KVCacheMetadata(tokens=memory, build_s=0.0, kv_bytes=kv_bytes, fingerprint=fingerprint))
        )
    return items


class _TorchComparison:
    """Writes and reads the same tensors with a storage format of this package and with torch."""

    def __init__(self, bench: Bench, items: list[KVCacheItem], storage: Storage, path: Path) -> None:
        self.bench, self.items, self.storage, self.path = bench, items, storage, path
        self.torch_path = path.with_name("torch.pt")
        self.steps: dict[str, Callable[[], object]] = {
            "dump": self.dump,
            "torch_save": self.torch_save,
            "load": self.load,
            "torch_load": self.torch_load,
        }

    def dump(self) -> None:
        self.storage.dump(self.path, self.items)

    def load(self) -> list[KVCacheItem]:
        return self.storage.load(self.path, self.bench.backend.fingerprint, self.bench.backend.model_config, CPU)

    def torch_save(self) -> None:
        with open(self.torch_path, "wb") as file:
            torch.save(_named(self.items), file)
            file.flush()
            os.fsync(file.fileno())

    def torch_load(self) -> Tensors:
        tensors: Tensors = torch.load(self.torch_path)
        return tensors

    def seconds(self, rng: random.Random) -> dict[str, float]:
        """The seconds of each step in one round."""
        times = {}
        for kinds in (("dump", "torch_save"), ("load", "torch_load")):
            for name in rng.sample(kinds, 2):
                self._prepare(name)
                started = time.perf_counter()
                kept = self.steps[name]()
                times[name] = time.perf_counter() - started
                del kept  # frees the loaded tensors outside of the measured time
        return times

    def peaks(self) -> dict[str, int]:
        """The peak of anonymous memory during each step, above its level before, in bytes.

        A load's peak includes the tensors that it returns, unless these are pages of a mapped file. Empty if the
        operating system does not report anonymous memory.
        """
        extra: dict[str, int] = {}
        if not process_memory.is_reported():
            return extra
        for name, step in self.steps.items():
            self._prepare(name)
            kept, extra[name] = process_memory.peak_extra_bytes(step)
            del kept
        return extra

    def loads_the_same_bits(self) -> bool:
        """Whether every loaded tensor equals the dumped one to the bit, and every item has the same metadata."""
        loaded = self.load()
        ours, theirs = _named(self.items), _named(loaded)
        return (
            ours.keys() == theirs.keys()
            and all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours)
            and [item.metadata for item in loaded] == [item.metadata for item in self.items]
        )

    def _prepare(self, name: str) -> None:
        """Removes the file that a write replaces, collects garbage, and syncs the disk."""
        if name in ("dump", "torch_save"):
            (self.path if name == "dump" else self.torch_path).unlink(missing_ok=True)
        gc.collect()
        os.sync()


def _named(items: Sequence[KVCacheItem]) -> Tensors:
    """Every tensor by its name, "<item>.<layer>.k" or "<item>.<layer>.v"."""
    return {
        f"{i}.{layer}.{kind}": tensor
        for i, item in enumerate(items)
        for layer, pair in enumerate(dynamic_cache.layers_of(item.kv_cache))
        for kind, tensor in zip("kv", pair, strict=True)
    }
