"""What a scenario works on: the memory and its model, the limit of this machine, and the conditions of the figures."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

from experiments import hardware
from experiments.config import RunConfig
from experiments.rates import calibrate
from experiments.roofline import Rates, Roofline
from experiments.row import Row
from kvmem import KVCacheItem, KVCacheMemory, KVCacheMemoryConfig
from kvmem.backends.measured import MeasuredBackend
from kvmem.errors import ConfigError

log = logging.getLogger("experiments")


@dataclass
class Bench:
    """Opened once a run; every scenario measures on it."""

    config: RunConfig
    memory: KVCacheMemory
    backend: MeasuredBackend
    roofline: Roofline
    conditions: dict[str, Any]
    built: list[KVCacheItem] = field(default_factory=list)
    """Items in order of building, so that cells with the same memory build it once."""

    @classmethod
    def open(cls, config: RunConfig) -> Bench:
        """Checks that this machine is the layout that `config` names, loads the model, and calibrates the limit."""
        config.hardware.refuse_other_machines()
        _refuse_idle_gpus(config)
        log.info("loading %s on %s", config.model.source(), config.backend.backend)
        memory = KVCacheMemory(
            KVCacheMemoryConfig(
                extractor_llm={"backend": config.backend.backend, "config": config.backend},
                memory_filename=config.storage.memory_filename,
                merge=config.merge,
                template=config.template,
                separator=config.separator,
            )
        )
        backend = memory.backend
        if not isinstance(backend, MeasuredBackend):
            raise ConfigError(f"backend={config.backend.backend} answers, and can't be measured. Use another backend.")
        rates = _rates(backend)
        conditions = {"rates": dataclasses.asdict(rates), "origin": backend.fingerprint.origin}
        return cls(config, memory, backend, Roofline(rates, backend.model_config), conditions)

    def limit_s(self, computed_tokens: int, cached_tokens: int) -> float:
        """The least seconds in which this machine prefills so many tokens behind so many."""
        return self.roofline.limit_s(computed_tokens, cached_tokens)

    def recalibrate(self) -> None:
        """Once more, and the higher rates: a machine that was busy when the run opened read low, and an honest arm then
        seems to beat the limit. An arm that did not do the work still does."""
        rates = self.roofline.rates.best(_rates(self.backend))
        self.roofline = Roofline(rates, self.backend.model_config)
        self.conditions["rates"] = dataclasses.asdict(rates)

    def conditions_now(self) -> dict[str, Any]:
        """Clocks, temperature, versions, kernel and graph mode, and what warming up has cost until now."""
        return hardware.conditions() | self.backend.conditions() | self.conditions

    def row(self, scenario: str, **fields: Any) -> Row:
        """A row with what is the same for all of this run filled in."""
        fingerprint = self.backend.fingerprint
        same: dict[str, Any] = {
            "model": self.config.model.label,
            "weights": self.config.model.weights,
            "dtype": fingerprint.dtype,
            "backend": type(self.backend).name,
            "attention": self.backend.attention,
            "hardware": self.config.hardware.label(),
            "merge": "single",
            "tier": self.backend.device.type,
            "arm": "injected",
        }
        return Row(scenario=scenario, **(same | fields))


def _refuse_idle_gpus(config: RunConfig) -> None:
    """ConfigError for an engine of one device on a layout that shares the model among several: its rows would carry
    the layout's name, and all devices but one would idle."""
    shared = config.hardware.tensor_parallel
    if shared > 1 and config.hardware.check and not hasattr(config.backend, "tensor_parallel_size"):
        raise ConfigError(
            f"hardware={config.hardware.name} shares a model among {shared} devices, and "
            f"backend={config.backend.backend} uses one. Use backend=hf_ranks or vllm, or a layout of one device."
        )


def _rates(backend: MeasuredBackend) -> Rates:
    """What the backend's device can do at best, and its ranks together."""
    return calibrate(backend.model_config, backend.dtype, backend.compute_device).times(backend.ranks)
