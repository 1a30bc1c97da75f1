"""The part of a run's configuration that scenarios use: model, engine, hardware, merge, storage and workload."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from experiments.hardware import Hardware
from experiments.workloads import Workload
from kvmem import storage
from kvmem.engines import BackendConfig, TensorParallelConfig
from kvmem.errors import ConfigError, did_you_mean
from kvmem.merge import MergeStrategy
from kvmem.models import loading
from kvmem.prompt import TemplateKind


@dataclass(config=ConfigDict(extra="forbid"))
class ModelCard:
    """A model and the source of its weights: `pretrained` (a hub or the packaged copy) or `random` (seeded)."""

    label: str
    """The model's published name, for tables, such as "Qwen3-8B"."""
    name: str | None = None
    """A hub name, a local folder, or smollm2-135m; None for a model that has only a shape."""
    shape: str | None = None
    """The shape of random weights (kvmem/models/shapes/<shape>.json)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    seed: int = 0
    """The seed of random weights."""

    def __post_init__(self) -> None:
        self.source()
        if self.shape is not None and self.shape not in loading.shapes():
            raise ConfigError(f"Unknown shape {self.shape!r}. {did_you_mean(self.shape, loading.shapes())}")

    def source(self) -> str:
        """The value of the library's `model_name_or_path`. Raises ConfigError if the card lacks a name or shape."""
        if self.weights == "random":
            if self.shape is None:
                raise ConfigError(f"{self.label} has no shape for random weights. Use model.weights=pretrained.")
            return loading.RANDOM + self.shape
        if self.name is None:
            raise ConfigError(
                f"{self.label} is a shape without trained weights. Use model.weights=random, or set model.name."
            )
        return self.name


@dataclass(config=ConfigDict(extra="forbid"))
class StorageCard:
    """The file that memories are dumped to. Its suffix selects the format."""

    memory_filename: str = "activation_memory.safetensors"

    def __post_init__(self) -> None:
        storage.for_filename(self.memory_filename)


@dataclass(config=ConfigDict(extra="forbid", arbitrary_types_allowed=True), kw_only=True)
class Setup:
    """What is measured, and on which engine and machine."""

    model: ModelCard
    backend: BackendConfig
    hardware: Hardware
    merge: MergeStrategy
    storage: StorageCard
    workload: Workload
    template: TemplateKind = "chat"
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    separator: str = "\n\n"
    seed: int = 0

    def __post_init__(self) -> None:
        """Copies the model's name and seed, and the layout's number of ranks, to the backend's configuration.

        Raises ConfigError if the backend's card sets another name or seed.
        """
        backend: Any = self.backend  # every engine's configuration is a dataclass
        from_model = {"model_name_or_path": (loading.PACKAGED, self.model.source()), "seed": (0, self.model.seed)}
        knobs = {field.name for field in dataclasses.fields(backend)}
        for knob, (default, chosen) in from_model.items():
            if knob in knobs and getattr(backend, knob) not in (default, chosen):
                raise ConfigError(
                    "backend.model_name_or_path and backend.seed come from the model card. "
                    "Set model.name and model.seed instead."
                )
        derived = {knob: chosen for knob, (_, chosen) in from_model.items() if knob in knobs}
        if (
            isinstance(self.backend, TensorParallelConfig)
            and self.backend.tensor_parallel_size == 1
            and self.hardware.is_here()
        ):
            derived["tensor_parallel_size"] = self.hardware.tensor_parallel
        self.backend = dataclasses.replace(backend, **derived)
