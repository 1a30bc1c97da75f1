"""What a job asks its cluster for, as it follows from the hardware layout."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.hardware.layout import Hardware

CORES_A_GPU = 4
"""One that launches kernels, and the engine's own processes beside it."""


@dataclass(frozen=True)
class Resources:
    """Of one job, which is one engine; sizes are a node's. None: the cluster's own default."""

    nodes: int
    gpus_per_node: int | None
    memory_gb: float | None
    cores_per_node: int | None


def resources_of(hardware: Hardware) -> Resources:
    """Host memory: what the card states, else as much as the node's GPUs have, for weights pass through it.

    >>> resources_of(Hardware(gpu="NVIDIA H800", gpus=4, tensor_parallel=4, memory_gb=80))
    Resources(nodes=1, gpus_per_node=4, memory_gb=320.0, cores_per_node=16)
    """
    gpus = hardware.gpus // hardware.nodes
    memory_gb = hardware.host_memory_gb
    if memory_gb is None and gpus and hardware.memory_gb is not None:
        memory_gb = gpus * hardware.memory_gb
    return Resources(hardware.nodes, gpus or None, memory_gb, gpus * CORES_A_GPU or None)
