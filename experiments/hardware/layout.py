"""The hardware layout that a run is configured for, and the machine that it finds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch
from omegaconf import OmegaConf
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvmem.errors import ConfigError

CARDS = Path(__file__).parents[2] / "conf" / "hardware"
"""The folder of the layouts' cards."""
PACKAGES = ("kvmem", "torch", "transformers")


@plain_dataclass(frozen=True)
class GPU:
    """One GPU that this process may use. What its driver does not report is None."""

    name: str
    memory_gb: float
    driver: str | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_limit_w: float | None


@plain_dataclass(frozen=True)
class Machine:
    """A machine. `cores` are those that this process may run on; memory is in 10⁹ bytes."""

    cpu: str
    cores: int
    memory_gb: float
    gpus: tuple[GPU, ...]

    def __str__(self) -> str:
        if not self.gpus:
            return f"{self.cpu}, {self.cores} cores"
        names = {gpu.name: sum(other.name == gpu.name for other in self.gpus) for gpu in self.gpus}
        return ", ".join(f"{count} × {name}" for name, count in names.items())


@dataclass(config=ConfigDict(extra="forbid"))
class Hardware:
    """A hardware layout, as its card in conf/hardware describes it. All sizes are of one GPU.

    `gpu` is the name that the driver reports, so that "NVIDIA H100 80GB HBM3" is not mistaken for the PCIe card; None
    stands for whatever this machine is. `peak_tflops` by dtype are the vendor's dense peaks.
    """

    name: str = "local"
    gpu: str | None = None
    gpus: int = Field(default=0, ge=0)
    nodes: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    memory_gb: float | None = None
    peak_tflops: dict[str, float] = Field(default_factory=dict)
    bandwidth_gb_s: float | None = None
    interconnect_gb_s: float | None = None
    """Between two GPUs of a node, in one direction."""
    host_memory_gb: float | None = None
    """The least host memory of a node; None: any."""
    check: bool = True
    """Refuse a machine that is not this layout. False runs on it anyway; its figures are then not the layout's."""

    def __post_init__(self) -> None:
        if self.gpu is not None and self.tensor_parallel * self.pipeline_parallel != self.gpus:
            raise ConfigError(
                f"hardware={self.name}: tensor_parallel {self.tensor_parallel} × pipeline_parallel "
                f"{self.pipeline_parallel} is not gpus {self.gpus}. Change one of them."
            )

    def is_met_by(self, machine: Machine) -> bool:
        """Whether `machine` is this layout, or a node of it."""
        if self.gpu is None:
            return True
        found = sum(gpu.name == self.gpu for gpu in machine.gpus)
        return found >= self.gpus // self.nodes and machine.memory_gb >= (self.host_memory_gb or 0)

    def is_here(self) -> bool:
        """Whether this machine counts as the layout: a check is still to come, or it meets the layout now."""
        return self.check or self.is_met_by(inspect())

    def refuse_other_machines(self) -> None:
        """Raises ConfigError if `check` is set and this machine is not the layout. Call it before a model loads."""
        if self.check:
            self.refuse(inspect())

    def label(self) -> str:
        """The layout's name in tables; with the check off on another machine, that machine's too."""
        if self.check:
            return self.name
        machine = inspect()
        return self.name if self.is_met_by(machine) else f"{self.name} (not it: {machine})"

    def refuse(self, machine: Machine) -> None:
        """Raises ConfigError that describes `machine` if it is not this layout, or a node of it."""
        if self.is_met_by(machine):
            return
        gpus_of_a_node = self.gpus // self.nodes
        memory = f" and {self.host_memory_gb:.0f} GB of memory" if self.host_memory_gb is not None else ""
        raise ConfigError(
            f"hardware={self.name} is {gpus_of_a_node} × {self.gpu}{memory} a node, and this machine is {machine} "
            f"({machine.memory_gb:.0f} GB of memory). Use hardware=local to measure this machine, or "
            "hardware.check=false to run anyway."
        )


def inspect() -> Machine:
    """This machine: its CPU, and the GPUs that torch may use, with their current clocks and temperature."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(
        _cpu_name(), cores(), psutil.virtual_memory().total / 1e9, tuple(_gpu(index) for index in range(count))
    )


def cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def conditions() -> dict[str, Any]:
    """What a figure depends on, for its row: versions, commit, threads, and the machine's current state. Plain JSON."""
    machine = inspect()
    return {
        **{package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "machine": str(machine),
        "cpu": machine.cpu,
        "cores": machine.cores,
        "load_1min": round(psutil.getloadavg()[0], 2),
        "gpus": [asdict(gpu) for gpu in machine.gpus],
    }


@cache
def commit() -> str | None:
    """The checkout's commit, with "+" if tracked files differ from it; KVMEM_COMMIT in a copy without a history.

    It is read once, at the first call: later edits are not the code that runs. This also avoids a fork of a process
    that holds a model, whose memory a cluster would count twice for a moment.
    """
    if "KVMEM_COMMIT" in os.environ:
        return os.environ["KVMEM_COMMIT"]
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:  # no commit yet, or git does not trust the owner of the folder
        return None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed: the commit identifies it
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(index: int) -> GPU:
    properties = torch.cuda.get_device_properties(index)
    state: dict[str, Any] = dict.fromkeys(
        ("driver", "sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_limit_w")
    )
    try:
        pynvml.nvmlInit()
        # By UUID: torch numbers the GPUs that CUDA_VISIBLE_DEVICES leaves, the driver numbers all.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        state["driver"] = pynvml.nvmlSystemGetDriverVersion()
        state["sm_clock_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        state["memory_clock_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        state["temperature_c"] = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        state["power_limit_w"] = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3
    except pynvml.NVMLError:  # another vendor's GPU, or a driver that reports only a part: the rest stays None
        pass
    return GPU(properties.name, properties.total_memory / 1e9, **state)


def read_card(path: Path) -> Hardware:
    """The layout of a card in conf/hardware, with the data sheet of its GPU."""
    return Hardware(**{name: value for name, value in _composed(path).items() if name != "_target_"})


@cache
def _composed(path: Path) -> dict[str, Any]:
    """A card's knobs over those of the cards that its `defaults` name, as Hydra composes them; needs no Hydra."""
    own = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(own, dict)
    knobs: dict[Any, Any] = {}
    for part in own.pop("defaults", ["_self_"]):
        name = str(part).partition("@")[0]
        knobs |= own if name == "_self_" else _composed(path.parent / f"{name}.yaml")
    return {str(name): value for name, value in knobs.items()}
