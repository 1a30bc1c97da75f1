"""What do dump and load cost in time and memory, compared with torch.save + fsync and torch.load?"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments.bench import Bench, timed_calls
from experiments.measurement import BASELINE, RULES_VERSION, judge_timings, process_memory, ttft
from experiments.results import Evidence, Row, TimedPayload, Timing, between, formatting
from experiments.scenarios.base import ModelScenario
from kvmem import KVCacheItem
from kvmem import storage as formats
from kvmem.cache import KeptTensor, KVCacheMetadata, MemoryTokens, dynamic_cache
from kvmem.engines import FirstToken
from kvmem.prompt import TokenizedPrompt
from kvmem.storage import Storage, TemporaryFolder

ITEMS = 8
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
SMALL_BYTES = 10_000_000
"""Of smaller files torch's time is mostly overhead, so that it may take proportionally longer beside a plain step."""
ARMS = ("dump", "torch_save", "load", "torch_load")
PAIRS = (("dump", "torch_save", "plain_write", 4.0), ("load", "torch_load", "plain_read", 4.0))
"""Our step, torch's, a plain one, and how many times as long as the plain one torch's may take.
Measured: 2.1 to 2.8 for torch.save, which computes checksums, and 0.3 to 1.5 for torch.load."""


@plain_dataclass(frozen=True)
class StorageCell:
    """One file format."""

    label: str
    memory_filename: str


@plain_dataclass(frozen=True, kw_only=True)
class StoragePayload(TimedPayload):
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
    plain_write_s: float | None = None
    """Writing the same bytes to a file and syncing it, without torch."""
    plain_read_s: float | None = None
    """Reading the same bytes from a file, without torch."""

    def remarks(self) -> list[str]:
        ratios = {"dump": self.dump_ratio, "load": self.load_ratio}
        found = [f"{step} is slower than torch's" for step, over in ratios.items() if over > 1]
        if self.kv_bytes < SMALL_BYTES and self.timings:
            most = formatting.digits(self.timings[0].evidence.most_over_baseline or 0.0)
            found.append(f"with files this small torch's time is overhead: it may take {most} times the plain step")
        return found

    def from_calls(self) -> dict[str, float]:
        times = {
            call.arm: [other.engine_s for other in timing.evidence.calls if other.arm == call.arm]
            for timing in self.timings
            for call in timing.evidence.calls
        }
        found = {f"{arm}_s": median(times[arm]) for arm in ARMS}
        return found | {
            "dump_ratio": found["dump_s"] / found["torch_save_s"],
            "load_ratio": found["load_s"] / found["torch_load_s"],
        }


@dataclass(config=ConfigDict(extra="forbid"))
class StorageScenario(ModelScenario[StorageCell]):
    """Writes and reads 8 items of random KV, of the model's shape, with this package and with torch.

    The order within a round is random. A write always creates a new file: the old one is removed, and the disk is
    synced first. A read finds the file in the page cache. Our load includes the checksum, which reads every page.
    torch.load copies every page and has no checksum. A first round, whose time does not count, warms up and measures
    memory.

    In the same rounds the same bytes are written and read without torch, so that a slow torch is noticed.
    """

    gigabytes: float = Field(1.0, gt=0)
    """Size of all keys and values, in 10⁹ bytes."""
    repeats: int = Field(6, ge=1)
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
        with TemporaryFolder("kvmem-storage-", Path(self.folder)) as folder:
            path = folder / cell.memory_filename
            comparison = _TorchComparison(bench, items, formats.for_filename(cell.memory_filename), path)
            peaks = comparison.peaks()
            timings = [comparison.timing(*pair, self.repeats) for pair in PAIRS]
        kv_bytes = comparison.kv_bytes
        seconds_all = {
            call.arm: [other.engine_s for other in timing.evidence.calls if other.arm == call.arm]
            for timing in timings
            for call in timing.evidence.calls
        }
        seconds = {name: median(times) for name, times in seconds_all.items()}
        baselines = [
            median(call.engine_s for call in timing.evidence.calls if call.arm == BASELINE) for timing in timings
        ]
        equal = not any(timing.evidence.kv_off_built for timing in timings)
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
            dump_all_s=seconds_all["dump"],
            torch_save_all_s=seconds_all["torch_save"],
            load_all_s=seconds_all["load"],
            torch_load_all_s=seconds_all["torch_load"],
            plain_write_s=baselines[0],
            plain_read_s=baselines[1],
            timings=timings,
        )
        row = bench.row(
            self.name,
            arm=cell.label,
            tier="disk",
            context_tokens=items[0].metadata.token_count,
            query_tokens=0,
            memories=ITEMS,
            pairs=self.repeats,
            equality="bitwise" if equal else "diverged",
            conditions=bench.conditions_now(),
            payload=payload,
        )
        verdict = judge_timings(row, payload)
        return [replace(row, verdict=verdict.verdict, verdict_reason=verdict.reason, rules=RULES_VERSION)]

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        payloads = [row.payload for row in rows if isinstance(row.payload, StoragePayload)]
        dump = between([payload.dump_ratio for payload in payloads], " ×")
        load = between([payload.load_ratio for payload in payloads], " ×")
        return f"dump takes {dump} torch.save's time, load {load} torch.load's."


def random_items(bench: Bench, total_bytes: int, count: int) -> list[KVCacheItem]:
    """`count` items in RAM, with the shape and dtype of the bench's model, and about `total_bytes` in total."""
    fingerprint = bench.backend.fingerprint
    layout = fingerprint.cache_layout
    tokens = max(1, (total_bytes // count - layout.bytes_a_memory) // layout.bytes_a_token)
    generator = torch.Generator().manual_seed(bench.setup.seed)

    def draw(kept: KeptTensor) -> torch.Tensor:
        dtype, shape = kept.at(tokens)
        return torch.randn(shape, dtype=dtype, generator=generator)

    items = []
    for i in range(count):
        contents = [{kept.name: draw(kept) for kept in layer} for layer in layout.layers]
        cache = dynamic_cache.from_contents(contents, bench.backend.model_config, tokens)
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
        self.torch_path, self.plain_path = path.with_name("torch.pt"), path.with_name("plain")
        self.kv_bytes = sum(dynamic_cache.nbytes(item.kv_cache) for item in items)
        self.wrong: list[str] = []
        """The steps that wrote too little, or returned other tensors than those that were written."""
        self.kept: Any = None
        self.done = ""
        self.steps: dict[str, Callable[[], object]] = {
            "dump": self.dump,
            "torch_save": self.torch_save,
            "load": self.load,
            "torch_load": self.torch_load,
            "plain_write": self.plain_write,
            "plain_read": self.plain_read,
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

    def timing(self, ours: str, theirs: str, plain: str, most: float, repeats: int) -> Timing:
        """Times one of our steps, torch's and a plain one in the same rounds, in random order."""
        arms = {
            name: ttft.Arm(partial(self._timed, step), partial(self._prepare, step))
            for name, step in ((ours, ours), (theirs, theirs), (BASELINE, plain))
        }
        rng = random.Random(self.bench.setup.seed)
        self.wrong = []
        samples, runs = ttft.interleaved_calm(arms, [""] * repeats, rng)
        self.check()
        return Timing(
            arm=ours,
            measured_times=runs,
            least_s=self.kv_bytes / self.bench.roofline.rates.bytes_per_s,
            evidence=Evidence(
                calls=timed_calls(samples),
                calls_made={name: arms[name].calls for name in (ours, theirs)},
                direct_arm=theirs,
                reference=f"a plain {plain.removeprefix('plain_')} of the same bytes",
                most_over_baseline=most * max(1.0, SMALL_BYTES / self.kv_bytes),
                kv_off_built=float(bool(self.wrong)),
            ),
        )

    def _timed(self, step: str, question: str) -> ttft.Sample:
        started = time.perf_counter()
        self.kept = self.steps[step]()
        seconds = time.perf_counter() - started
        self.done = step
        return ttft.Sample(seconds, seconds, 0.0, FirstToken(0, 0), TokenizedPrompt((), ()), split_s=0.0)

    def check(self) -> None:
        """Looks at what the last timed step wrote or returned. It runs between the calls."""
        if self.done in ("dump", "torch_save"):
            path = self.path if self.done == "dump" else self.torch_path
            if not path.is_file() or path.stat().st_size < self.kv_bytes:
                self.wrong.append(self.done)
        elif (self.done == "load" and not self._same(self.kept)) or (
            self.done == "torch_load" and not _equal(self.kept, _named(self.items))
        ):
            self.wrong.append(self.done)
        self.kept, self.done = None, ""

    def peaks(self) -> dict[str, int]:
        """The peak of anonymous memory during each step, above its level before, in bytes.

        A load's peak includes the tensors that it returns, unless these are pages of a mapped file. Empty if the
        operating system does not report anonymous memory.
        """
        extra: dict[str, int] = {}
        if not process_memory.is_reported():
            return extra
        for name in ARMS:
            step = self.steps[name]
            self._prepare(name)
            kept, extra[name] = process_memory.peak_extra_bytes(step)
            del kept
        return extra

    def plain_write(self) -> None:
        with open(self.plain_path, "wb", buffering=0) as file:
            for tensor in _named(self.items).values():
                file.write(tensor.contiguous().view(torch.uint8).view(-1).numpy().data)
            os.fsync(file.fileno())

    def plain_read(self) -> bytes:
        return self.plain_path.read_bytes()

    def _same(self, loaded: list[KVCacheItem]) -> bool:
        """Whether every loaded tensor equals the dumped one to the bit, and every item has the same metadata."""
        return _equal(_named(loaded), _named(self.items)) and [item.metadata for item in loaded] == [
            item.metadata for item in self.items
        ]

    def _prepare(self, step: str) -> None:
        """Checks the last step, removes the file that a write replaces, collects garbage, and syncs the disk."""
        self.check()
        paths = {"dump": self.path, "torch_save": self.torch_path, "plain_write": self.plain_path}
        if step in paths:
            paths[step].unlink(missing_ok=True)
        gc.collect()
        os.sync()


def _equal(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours
    )


def _named(items: Sequence[KVCacheItem]) -> Tensors:
    """Every tensor by its name, "<item>.<layer>.k" or "<item>.<layer>.v"."""
    return {
        f"{i}.{layer}.{kind}": tensor
        for i, item in enumerate(items)
        for layer, kept in enumerate(dynamic_cache.contents_of(item.kv_cache))
        for kind, tensor in kept.items()
    }
