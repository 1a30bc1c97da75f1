"""The bench of a run: the memory and its model, the hardware's limit, and the measurement conditions."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from experiments.bench.kv_distance import KVCheck
from experiments.bench.setup import Setup
from experiments.hardware import layout
from experiments.measurement import ColdAnswer, ReferenceForward, engine_conditions, reference_forward
from experiments.performance_model import Rates, Roofline, calibrate, datasheet
from experiments.results import Row
from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache import KVCacheItem, Source
from kvmem.engines import MeasuredBackend, TensorParallelConfig
from kvmem.errors import ConfigError

log = logging.getLogger("experiments")
BUILDS = 3
"""The number of measurements of each build. The build time is their median."""


@dataclass
class Bench:
    """What the cells of a run are measured on. A run opens one."""

    setup: Setup
    memory: KVCacheMemory
    backend: MeasuredBackend
    roofline: Roofline
    conditions: dict[str, Any]
    built: list[KVCacheItem] = field(default_factory=list)
    """The items of this run, in the order of their builds. Cells with the same memory share one item."""
    build_times_s: dict[str, list[float]] = field(default_factory=dict)
    """The seconds of every measured build of an item, by the item's id."""
    cold_answers: dict[str, ColdAnswer] = field(default_factory=dict)
    """vLLM's own answers to whole prompts, by the digest of the prompt and the number of tokens."""
    kv_checks: dict[str, KVCheck] = field(default_factory=dict)
    """What `kv_check` found of an item, by the item's id."""

    @classmethod
    def open(cls, setup: Setup) -> Bench:
        """Loads the model and calibrates the limit.

        Raises ConfigError if this machine does not match the layout of `setup`, or if the engine can't be measured.
        """
        setup.hardware.refuse_other_machines()
        _refuse_idle_gpus(setup)
        log.info("loading %s on %s", setup.model.source(), setup.backend.backend)
        memory = KVCacheMemory(
            KVCacheMemoryConfig(
                extractor_llm={"backend": setup.backend.backend, "config": setup.backend},
                memory_filename=setup.storage.memory_filename,
                merge=setup.merge,
                template=setup.template,
                chat_template_kwargs=setup.chat_template_kwargs,
                separator=setup.separator,
            )
        )
        backend = memory.backend
        if not isinstance(backend, MeasuredBackend):
            raise ConfigError(f"backend={setup.backend.backend} can't be measured. Use another backend.")
        rates = _rates(backend)
        conditions = {"rates": dataclasses.asdict(rates), "origin": backend.fingerprint.origin}
        if backend.fingerprint.dtype in setup.hardware.peak_tflops and setup.hardware.bandwidth_gb_s is not None:
            conditions["data_sheet"] = dataclasses.asdict(datasheet(setup.hardware, backend.fingerprint.dtype))
        return cls(setup, memory, backend, Roofline(rates, backend.model_config), conditions)

    @cached_property
    def reference(self) -> ReferenceForward:
        """The independent forward pass that figures are judged by."""
        return reference_forward(self.backend)

    def limit_s(self, computed_tokens: int, cached_tokens: int) -> float:
        """The shortest possible seconds of a prefill of `computed_tokens` after `cached_tokens` on this machine."""
        return self.roofline.limit_s(computed_tokens, cached_tokens)

    def recalibrate(self) -> None:
        """Calibrates again and keeps the higher rates.

        If the machine was busy during the first calibration, its rates are too low, and a correct arm seems faster than
        the limit. After a new calibration it is not, but an arm that skipped work still is.
        """
        rates = self.roofline.rates.best(_rates(self.backend))
        self.roofline = Roofline(rates, self.backend.model_config)
        self.conditions["rates"] = dataclasses.asdict(rates)

    def conditions_now(self) -> dict[str, Any]:
        """The conditions of a measurement: clocks, temperature, versions, kernel, graph mode and warm-up cost."""
        return layout.conditions() | engine_conditions(self.backend) | self.conditions

    def row(self, scenario: str, **fields: Any) -> Row:
        """A row with the identity that all rows of this run share. `fields` override it."""
        fingerprint = self.backend.fingerprint
        shared: dict[str, Any] = {
            "model": self.setup.model.label,
            "weights": self.setup.model.weights,
            "dtype": fingerprint.dtype,
            "backend": type(self.backend).name,
            "attention": self.backend.attention,
            "hardware": self.setup.hardware.label(),
            "merge": "single",
            "tier": self.backend.device.type,
            "arm": "injected",
        }
        return Row(scenario=scenario, **(shared | fields))


def _refuse_idle_gpus(setup: Setup) -> None:
    """Raises ConfigError if an engine that uses one device would run on a layout with a tensor-parallel model.

    Its rows would have the layout's name, although all devices but one are idle.
    """
    ranks = setup.hardware.tensor_parallel
    if ranks > 1 and setup.hardware.check and not isinstance(setup.backend, TensorParallelConfig):
        raise ConfigError(
            f"hardware={setup.hardware.name} divides a model among {ranks} devices, and "
            f"backend={setup.backend.backend} uses one. Use backend=hf_ranks or vllm, or a layout of one device."
        )


def _rates(backend: MeasuredBackend) -> Rates:
    """The calibrated rates of all ranks of the backend together."""
    return calibrate(backend.model_config, backend.dtype, backend.compute_device).times(backend.ranks)


def build_once(bench: Bench, source: Source) -> KVCacheItem:
    """The item of `source`: one that this run has built already, or a new one."""
    for item in bench.built:
        if item.metadata.tokens.source == source:
            return item
    base = next((item for item in reversed(bench.built) if _extends(item.metadata.tokens.source, source)), None)
    turns = source if base is None else source[len(base.metadata.tokens.source) :]
    bench.memory.extract(turns, base=base)  # warms up this shape
    builds = [bench.memory.extract(turns, base=base) for _ in range(BUILDS)]
    item = builds[-1]
    bench.built.append(item)
    bench.build_times_s[item.kv_cache_id] = [built.metadata.build_s for built in builds]
    return item


def builds_s(bench: Bench, items: Sequence[KVCacheItem]) -> list[float]:
    """Seconds of each measured build of all `items` together, including the builds of the items that they extend."""
    needed = [
        built
        for built in bench.built
        if any(built is item or _extends(built.metadata.tokens.source, item.metadata.tokens.source) for item in items)
    ]
    return [sum(times) for times in zip(*(bench.build_times_s[built.kv_cache_id] for built in needed), strict=True)]


def _extends(earlier: Source, source: Source) -> bool:
    """Whether both are dialogues and `source` begins with `earlier`."""
    if isinstance(earlier, str) or isinstance(source, str):
        return False
    return len(earlier) < len(source) and source[: len(earlier)] == earlier
