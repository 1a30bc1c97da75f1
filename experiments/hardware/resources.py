"""What a job requests from a cluster: it follows from the hardware layout."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.hardware.layout import Hardware

CORES_A_GPU = 4
"""One launches kernels; the others are for the engine's own processes."""


@dataclass(frozen=True)
class Resources:
    """The resources of one job, which is one engine. Sizes are of one node; None is the cluster's default."""

    nodes: int
    gpus_per_node: int | None
    memory_gb: float | None
    cores_per_node: int | None


def resources_of(hardware: Hardware) -> Resources:
    """The resources that a layout needs.

    Host memory is what the card states, else the memory of the node's GPUs: weights pass through it.

    >>> resources_of(Hardware(gpu="NVIDIA H800", gpus=4, tensor_parallel=4, memory_gb=80))
    Resources(nodes=1, gpus_per_node=4, memory_gb=320.0, cores_per_node=16)
    """
    gpus = hardware.gpus // hardware.nodes
    memory_gb = hardware.host_memory_gb
    if memory_gb is None and gpus and hardware.memory_gb is not None:
        memory_gb = gpus * hardware.memory_gb
    return Resources(hardware.nodes, gpus or None, memory_gb, gpus * CORES_A_GPU or None)
