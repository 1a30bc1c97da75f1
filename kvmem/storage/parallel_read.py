"""Reads the body of a file to a device. Threads read regions into pinned memory, verify them, and copy them on.

The verified bytes are the copied bytes, and each region passes the CPU's cache once. Reads, hashing and copies to the
device overlap, and several reads are in flight at a time.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import torch

from kvmem.storage.checksums import Regions, checksum_error, for_each_region
from kvmem.storage.region_reads import read_exactly, thread_count

BUFFERS_PER_THREAD = 2
"""One buffer is filled while the other is copied to the device."""

Span = tuple[int, int]
"""Start and end, in bytes from the start of the body."""


class _Buffer:
    """Host memory for one region, pinned if the device is a GPU, and the event of the copy that reads it."""

    def __init__(self, size_bytes: int, on_gpu: bool) -> None:
        self.bytes_N = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.view = memoryview(cast(Any, self.bytes_N.numpy()))
        self.copied = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        """Waits until the last copy from this buffer has finished."""
        if self.copied is not None:
            self.copied.synchronize()

    def record_copies(self) -> None:
        """Makes `wait` cover the copies that this thread's stream has been given so far."""
        if self.copied is not None:
            self.copied.record()


def read(
    file: io.FileIO, body_at: int, regions: Regions, spans: Sequence[Span], device: torch.device, path: Path
) -> list[torch.Tensor]:
    """For each span of the body a uint8 tensor on `device` with its bytes. The body begins at byte `body_at`.

    When this returns, every region is verified and on the device, so the tensors may be used on any stream. The host
    waits for the last copy; ordering it on the caller's stream instead would be wrong for a caller with two streams.
    Raises DamagedFileError if a region does not have its checksum, or OSError.
    """
    targets = [torch.empty(end - start, dtype=torch.uint8, device=device) for start, end in spans]
    if not len(regions):
        return targets
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # that stream may still use the targets' memory
    # torch keeps released pinned memory, so only the first load of a process pays for its allocation.
    free: SimpleQueue[_Buffer] = SimpleQueue()
    for _ in range(min(BUFFERS_PER_THREAD * thread_count(len(regions)), len(regions))):
        free.put(_Buffer(min(regions.region_bytes, regions.body_bytes), stream is not None))

    @torch.inference_mode()  # the mode is per thread, and the caller may have made the targets in inference mode
    def load_region(i: int) -> None:
        buffer = free.get()  # the one that was released first, whose copy has most likely finished
        start, end = regions.span(i)
        buffer.wait()
        data = buffer.view[: end - start]
        if not read_exactly(file.fileno(), data, body_at + start):
            raise checksum_error(path)
        regions.check(i, data, path)
        for target, (first, last) in zip(targets, spans, strict=True):
            low, high = max(start, first), min(end, last)
            if low < high:
                target[low - first : high - first].copy_(buffer.bytes_N[low - start : high - start], non_blocking=True)
        buffer.record_copies()
        free.put(buffer)  # after an error it stays away: the thread ends, and every other thread has its own buffers

    start_thread = partial(torch.cuda.set_stream, stream) if stream is not None else None
    try:
        for_each_region(load_region, len(regions), start_thread)
    finally:  # after an error too, because copies into the targets may be pending when these are freed
        if stream is not None:
            stream.synchronize()
    return targets
