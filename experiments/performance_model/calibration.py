"""The peak rates of a machine, from its data sheet or measured with a model's own matrix products."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from experiments.hardware import Hardware
from experiments.performance_model.roofline import Rates, Shape, shape_of
from kvmem.errors import ConfigError

CALIBRATION_S = 2.0
"""Seconds for the matrix products. The bandwidth takes a quarter of it."""
CALIBRATION_TOKENS = {"cpu": (64, 256, 1024), "cuda": (512, 2048, 8192)}
"""Token counts of the products. The best count depends on shape and machine."""
MAX_FLOP_A_PRODUCT = {"cpu": 4e10, "cuda": 1e14}
"""Larger products are skipped. On two cores, one takes a second."""
BANDWIDTH_BYTES = {"cpu": 2**28, "cuda": 2**30}


def datasheet(hardware: Hardware, dtype: str) -> Rates:
    """The data sheet rates of all GPUs of a layout together. Raises ConfigError if the card does not state them."""
    if dtype not in hardware.peak_tflops or hardware.bandwidth_gb_s is None:
        raise ConfigError(
            f"The card hardware={hardware.name} has no peak rate for {dtype}. Add peak_tflops.{dtype} and "
            "bandwidth_gb_s to it, or calibrate on the machine itself."
        )
    how = f"datasheet of {hardware.gpus} × {hardware.gpu}"
    flop_per_s, bytes_per_s = hardware.peak_tflops[dtype] * 1e12, hardware.bandwidth_gb_s * 1e9
    return Rates(hardware.gpus * flop_per_s, hardware.gpus * bytes_per_s, dtype, how)


@torch.inference_mode()
def calibrate(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Rates:
    """Measures this machine's peak rates for this model, in about 3 s. Each rate is the best of many timings.

    The FLOP rate is measured with the model's own matrix products at several token counts, because square products give
    lower rates on a CPU. The byte rate is measured with a copy and a read of at most the size of the weights, because a
    small model can stay in the CPU's cache.

    Raises ConfigError if too little memory is free.
    """
    shape = shape_of(config)
    flop_per_s, product = _best_flop_per_s(shape, dtype, device)
    bytes_per_s, kind = _best_bytes_per_s(shape.weights * dtype.itemsize, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    how = f"calibrated on {name}: {product}; {kind}"
    return Rates(flop_per_s, bytes_per_s, str(dtype).removeprefix("torch."), how)


def _best_flop_per_s(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    free = _free_bytes(device) // dtype.itemsize
    by_size = {size: name for name, size in shape.products.items() if name != "head" and math.prod(size) <= free // 8}
    counts = CALIBRATION_TOKENS[device.type]
    small_first = sorted((2 * tokens * out * in_, tokens, out, in_) for out, in_ in by_size for tokens in counts)
    fitting = [case for case in small_first if case[1] * (case[2] + case[3]) <= free // 4]
    if not fitting:
        raise ConfigError(
            f"Only {_free_bytes(device) / 1e6:.0f} MB of {device} are free, which is too little to measure its rates. "
            "Let the engine reserve less memory (backend.gpu_memory_utilization)."
        )
    affordable = [case for case in fitting if case[0] <= MAX_FLOP_A_PRODUCT[device.type]] or fitting[:1]
    weights = {(out, in_): torch.randn(out, in_, dtype=dtype, device=device) for _, _, out, in_ in affordable}
    best, product, deadline = 0.0, "", time.perf_counter() + CALIBRATION_S
    # The cases take turns, so that a short disturbance affects each of them only a few times.
    for flop, tokens, out, in_ in itertools.cycle(reversed(affordable)):
        if best and time.perf_counter() > deadline:
            break
        x_TI = torch.randn(tokens, in_, dtype=dtype, device=device)
        seconds = _seconds(partial(F.linear, x_TI, weights[out, in_]), device, 3)
        if flop / seconds > best:
            best, product = flop / seconds, f"{by_size[out, in_]} product with {tokens} tokens"
    return best, product


def _best_bytes_per_s(weight_bytes: int, device: torch.device) -> tuple[float, str]:
    size = min(weight_bytes, BANDWIDTH_BYTES[device.type], _free_bytes(device) // 4) // 4
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    operations: dict[str, tuple[int, Callable[[], object]]] = {
        "a copy": (2 * source.nbytes, lambda: target.copy_(source)),
        "a read": (source.nbytes, lambda: source.sum()),
    }
    best, kind, deadline = 0.0, "", time.perf_counter() + CALIBRATION_S / 4
    for name, (moved, operation) in itertools.cycle(operations.items()):
        if kind and time.perf_counter() > deadline:
            break
        rate = moved / _seconds(operation, device, 3)
        if rate > best:
            best, kind = rate, f"{name} of {source.nbytes / 1e6:.0f} MB"
    return best, kind


def _free_bytes(device: torch.device) -> int:
    """The free memory of the device in bytes. An engine in another process may use nearly all of it."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The seconds of the fastest of `repeats` runs after a warm-up. A GPU is timed with CUDA events."""
    work()
    times: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return min(times)
