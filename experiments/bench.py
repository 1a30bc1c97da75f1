"""What a scenario works on: the memory and its model, the limit of this machine, and the conditions of the figures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from experiments import hardware, roofline
from experiments.config import RunConfig
from experiments.roofline import Roofline
from experiments.row import Row
from kvmem import KVCacheItem, KVCacheMemory, KVCacheMemoryConfig
from kvmem.backends.hf import HFBackend
from kvmem.prompt import TokenizedPrompt


@dataclass
class Bench:
    """Opened once a run; every scenario measures on it."""

    config: RunConfig
    memory: KVCacheMemory
    backend: HFBackend
    roofline: Roofline
    conditions: dict[str, Any]
    built: list[KVCacheItem] = field(default_factory=list)
    """Items in order of building, so that cells with the same memory build it once."""

    @classmethod
    def open(cls, config: RunConfig) -> Bench:
        """Checks that this machine is the layout that `config` names, loads the model, and calibrates the limit."""
        config.hardware.refuse_other_machines()
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
        assert isinstance(backend, HFBackend)
        rates = roofline.calibrate(backend.model_config, backend.model.dtype, backend.device)
        conditions = {
            "rates": dataclasses.asdict(rates),
            "origin": backend.fingerprint.origin,
            "graphs": "none (eager)",
        }
        return cls(config, memory, backend, Roofline(rates, backend.model_config), conditions)

    def limits_s(self, injected: TokenizedPrompt, direct: TokenizedPrompt) -> tuple[float, float]:
        """The least seconds of the injected and of the direct arm."""
        limit_s = self.roofline.limit_s
        return limit_s(len(injected.query_ids), len(injected.memory_ids)), limit_s(len(direct.ids), 0)

    def recalibrate(self) -> None:
        """Once more, and the higher rates: a machine that was busy when the run opened read low, and an honest arm then
        seems to beat the limit. An arm that did not do the work still does."""
        model = self.backend.model
        rates = self.roofline.rates.best(
            roofline.calibrate(self.backend.model_config, model.dtype, self.backend.device)
        )
        self.roofline = Roofline(rates, self.backend.model_config)
        self.conditions["rates"] = dataclasses.asdict(rates)

    def conditions_now(self) -> dict[str, Any]:
        """Clocks, temperature, versions, kernel and graph mode, read now."""
        return hardware.conditions() | self.conditions

    def row(self, scenario: str, **fields: Any) -> Row:
        """A row with what is the same for all of this run filled in."""
        fingerprint = self.backend.fingerprint
        same: dict[str, Any] = {
            "model": self.config.model.label,
            "weights": self.config.model.weights,
            "dtype": fingerprint.dtype,
            "backend": type(self.backend).name,
            "attention": self.backend.model_config._attn_implementation,
            "hardware": self.config.hardware.name,
            "merge": "single",
            "tier": self.backend.device.type,
            "arm": "injected",
        }
        return Row(scenario=scenario, **(same | fields))
