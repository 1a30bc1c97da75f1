"""Host memory for files, in pages; used in a worker. With a GPU it is pinned, so that copies to the GPU overlap."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import torch

from kvmem.errors import EngineError
from kvmem.storage import SharedMemory, Target

PAGE_BYTES = 2 << 20
"""A file takes whole pages, which need not be adjacent, so the memory does not fragment."""


class Block:
    """Memory that was allocated at once, and that a process which reads files can share. `close` unpins it."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        """Raises EngineError if the machine has too little memory, or too little that can be pinned."""
        self.pinned_at = 0
        try:
            self.shared = SharedMemory(nbytes)
            self.bytes = torch.frombuffer(self.shared.map, dtype=torch.uint8)
            if pinned:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0))
                self.pinned_at = self.bytes.data_ptr()
        except (OSError, RuntimeError) as error:
            raise EngineError(
                f"{nbytes / 2**30:.3g} GiB of host memory can't be allocated ({error}). Lower host_cache_gib."
            ) from error

    def close(self) -> None:
        """No copy from it may be under way."""
        if self.pinned_at:
            torch.cuda.cudart().cudaHostUnregister(self.pinned_at)
            self.pinned_at = 0


class Extent:
    """Memory for one file: consecutive pieces of a block."""

    def __init__(self, block: Block, pieces: Sequence[tuple[int, int]], pages: Sequence[int] = ()) -> None:
        """pieces: where each begins and ends in the block."""
        self.block, self.pieces, self.pages = block, pieces, pages
        self.starts = [0]
        for start, end in pieces:
            self.starts.append(self.starts[-1] + end - start)

    def targets(self, start: int, end: int, body_at: int) -> list[Target]:
        """The memory of bytes `start` to `end`, for a file's body from `body_at` on."""
        return [Target(body_at + at - start, low, high - low) for at, low, high in self._parts(start, end)]

    def tensor(self, start: int, end: int, device: torch.device) -> torch.Tensor:
        """Bytes `start` to `end` on `device`: on a CPU a view where they are in one piece, else a copy.

        A copy to a GPU is ordered on the current stream, and the host does not wait for it.
        """
        parts = [(at, self.block.bytes[low:high]) for at, low, high in self._parts(start, end)]
        if device.type == "cpu" and len(parts) == 1:
            return parts[0][1]
        whole = torch.empty(end - start, dtype=torch.uint8, device=device)
        for at, part in parts:
            whole[at - start : at - start + part.numel()].copy_(part, non_blocking=True)
        return whole

    def _parts(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """For each piece of bytes `start` to `end` where it begins there, and where it is in the block."""
        parts = []
        for (at, _), (first, last) in zip(self.pieces, pairwise(self.starts), strict=True):
            low, high = max(start, first), min(end, last)
            if low < high:
                parts.append((low, at + low - first, at + high - first))
        return parts


class HostMemory:
    """`pages` pages, allocated at once. Pinned memory is slow to allocate: 0.1 s for a file of 400 MB.

    A file that is larger than all of it gets memory of its own.
    """

    def __init__(self, pages: int, pinned: bool) -> None:
        """Raises EngineError if the machine has too little memory that can be pinned."""
        self.pages, self.pinned = pages, pinned
        self.free = list(range(pages))
        self.block = Block(pages * PAGE_BYTES, pinned) if pages else None

    def take(self, nbytes: int) -> Extent:
        """Memory of at least so many bytes, with anything in it. The caller has made sure that enough pages are free,
        or that the file is larger than all pages."""
        count = -(-nbytes // PAGE_BYTES)
        if self.block is None or count > self.pages:
            return Extent(Block(nbytes, self.pinned), [(0, nbytes)])
        assert count <= len(self.free), f"{count} pages asked for, {len(self.free)} free"
        pages = [heapq.heappop(self.free) for _ in range(count)]
        pieces: list[tuple[int, int]] = []
        for at in (page * PAGE_BYTES for page in pages):
            start = pieces.pop()[0] if pieces and pieces[-1][1] == at else at
            pieces.append((start, at + PAGE_BYTES))
        return Extent(self.block, pieces, pages)

    def give_back(self, extent: Extent) -> None:
        """Frees the memory of a file. No copy from it may be under way."""
        if extent.block is not self.block:
            extent.block.close()
        for page in extent.pages:
            heapq.heappush(self.free, page)

    def close(self) -> None:
        """Unpins the memory. No copy from it may be under way."""
        if self.block is not None:
            self.block.close()
