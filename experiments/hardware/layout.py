"""The hardware that a run is made for, and what it finds: `python -m experiments.hardware` prints the latter,
and which layouts it can be (a node of)."""

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
"""Where each layout has its card."""
PACKAGES = ("kvmem", "torch", "transformers")


@plain_dataclass(frozen=True)
class GPU:
    """One GPU that this process may use; what its driver does not tell is None."""

    name: str
    memory_gb: float
    driver: str | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_limit_w: float | None


@plain_dataclass(frozen=True)
class Machine:
    """What this machine is. `cores` are those that this process may run on; memory in 10⁹ bytes."""

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
    """A layout that figures are taken on, as its name card in conf/hardware describes it; all sizes are of one GPU.

    `gpu` is the name that its driver gives it, so that "NVIDIA H100 80GB HBM3" is not taken for its PCIe card; None is
    whatever this machine is. `peak_tflops` by dtype are dense, as the maker states them.
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
    """Between two GPUs of a node, one way."""
    host_memory_gb: float | None = None
    """Least memory of a node; None: any."""
    check: bool = True
    """Refuse a machine that is not this layout; False runs on it anyway, and its figures are not this layout's."""

    def __post_init__(self) -> None:
        if self.gpu is not None and self.tensor_parallel * self.pipeline_parallel != self.gpus:
            raise ConfigError(
                f"hardware={self.name}: tensor_parallel {self.tensor_parallel} × pipeline_parallel "
                f"{self.pipeline_parallel} is not gpus {self.gpus}. Change one of them."
            )

    def is_met_by(self, machine: Machine) -> bool:
        """Whether `machine` is (a node of) this layout."""
        if self.gpu is None:
            return True
        here = sum(gpu.name == self.gpu for gpu in machine.gpus)
        return here >= self.gpus // self.nodes and machine.memory_gb >= (self.host_memory_gb or 0)

    def is_here(self) -> bool:
        """Whether a run may take this machine for the layout: by a check that is still to come, or by what is found."""
        return self.check or self.is_met_by(inspect())

    def refuse_other_machines(self) -> None:
        """ConfigError where `check` is set and this machine is not the layout: call it before a model loads."""
        if self.check:
            self.refuse(inspect())

    def label(self) -> str:
        """Its name in tables; where the check is off and this machine is another, that too."""
        if self.check:
            return self.name
        machine = inspect()
        return self.name if self.is_met_by(machine) else f"{self.name} (not it: {machine})"

    def refuse(self, machine: Machine) -> None:
        """ConfigError that says what `machine` is, where it is not (a node of) this layout."""
        if self.is_met_by(machine):
            return
        a_node = self.gpus // self.nodes
        memory = f" and {self.host_memory_gb:.0f} GB of memory" if self.host_memory_gb is not None else ""
        raise ConfigError(
            f"hardware={self.name} is {a_node} × {self.gpu}{memory} a node, and this machine is {machine} "
            f"({machine.memory_gb:.0f} GB of memory). Use hardware=local to measure this machine, or "
            "hardware.check=false to run anyway."
        )


def inspect() -> Machine:
    """This machine: its processor, and the GPUs that torch may use, with clocks and temperature as they are now."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(
        _cpu_name(), cores(), psutil.virtual_memory().total / 1e9, tuple(_gpu(index) for index in range(count))
    )


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def conditions() -> dict[str, Any]:
    """What a figure depends on and a row keeps: versions, commit, threads, and the machine's state now. Plain JSON."""
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
    """The checkout's commit, "+" where tracked files differ from it; KVMEM_COMMIT in a copy without its history. As it
    was when first asked, which is the code that runs: nor is a process with a model in it forked for each cell, whose
    memory a cluster would count twice for a moment."""
    if "KVMEM_COMMIT" in os.environ:
        return os.environ["KVMEM_COMMIT"]
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:  # no commit yet, or git does not trust the folder's owner
        return None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from the checkout without an installation: the commit says which
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
        # By UUID: torch counts the GPUs that CUDA_VISIBLE_DEVICES leaves, the driver counts all.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        state["driver"] = pynvml.nvmlSystemGetDriverVersion()
        state["sm_clock_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        state["memory_clock_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        state["temperature_c"] = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        state["power_limit_w"] = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3
    except pynvml.NVMLError:  # another maker's GPU, or a driver that does not tell all of it: the rest stays None
        pass
    return GPU(properties.name, properties.total_memory / 1e9, **state)


def read_card(path: Path) -> Hardware:
    """The layout that a card of conf/hardware tells of."""
    fields = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(fields, dict)
    return Hardware(**{str(key): value for key, value in fields.items() if key != "_target_"})


if __name__ == "__main__":
    from rich import print_json

    here = inspect()
    cards = [read_card(path) for path in sorted(CARDS.glob("*.yaml"))]
    layouts = [card.name for card in cards if card.is_met_by(here)]
    print_json(data=conditions() | {"memory_gb": round(here.memory_gb, 1), "layouts": layouts})
