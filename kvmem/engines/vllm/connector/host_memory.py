"""Host memory for files, in pages; used in a worker. With a GPU it is pinned, so that copies to the GPU overlap."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch

from kvmem.errors import EngineError

PAGE_BYTES = 2 << 20
"""A file takes whole pages, which need not be adjacent, so the memory does not fragment."""


class Extent:
    """Memory for one file: consecutive pieces, each a uint8 tensor of one dimension."""

    def __init__(self, pieces: Sequence[torch.Tensor], pages: Sequence[int] = ()) -> None:
        self.pieces, self.pages = pieces, pages
        self.starts = [0]
        for piece in pieces:
            self.starts.append(self.starts[-1] + piece.numel())

    def memory(self, start: int, end: int) -> list[tuple[int, memoryview]]:
        """The memory of bytes `start` to `end`, as parts and where each begins."""
        return [(at, memoryview(cast(Any, part.numpy()))) for at, part in self._parts(start, end)]

    def tensor(self, start: int, end: int, device: torch.device) -> torch.Tensor:
        """Bytes `start` to `end` on `device`: on a CPU a view where they are in one piece, else a copy.

        A copy to a GPU is ordered on the current stream, and the host does not wait for it.
        """
        parts = self._parts(start, end)
        if device.type == "cpu" and len(parts) == 1:
            return parts[0][1]
        whole = torch.empty(end - start, dtype=torch.uint8, device=device)
        for at, part in parts:
            whole[at - start : at - start + part.numel()].copy_(part, non_blocking=True)
        return whole

    def _parts(self, start: int, end: int) -> list[tuple[int, torch.Tensor]]:
        parts = []
        for piece, (first, last) in zip(self.pieces, pairwise(self.starts), strict=True):
            low, high = max(start, first), min(end, last)
            if low < high:
                parts.append((low, piece[low - first : high - first]))
        return parts


class HostMemory:
    """`pages` pages, allocated at once. Pinned memory is slow to allocate: 0.1 s for a file of 400 MB.

    A file that is larger than all of it gets memory of its own.
    """

    def __init__(self, pages: int, pinned: bool) -> None:
        """Raises EngineError if the machine has too little memory that can be pinned."""
        self.pages, self.pinned = pages, pinned
        self.free = list(range(pages))
        self.slabs: list[torch.Tensor] = []
        self.slab_of: list[tuple[int, int]] = []
        """For each page its slab and its place there, in bytes."""
        while len(self.slab_of) < pages:
            # torch pins powers of two: for any other size it would take the next one.
            count = 1 << (pages - len(self.slab_of)).bit_length() - 1
            self.slab_of += [(len(self.slabs), page * PAGE_BYTES) for page in range(count)]
            self.slabs.append(self._allocate(count * PAGE_BYTES))

    def take(self, nbytes: int) -> Extent:
        """Memory of at least so many bytes, with anything in it. The caller has made sure that enough pages are free,
        or that the file is larger than all pages."""
        count = -(-nbytes // PAGE_BYTES)
        if count > self.pages:
            return Extent([self._allocate(nbytes)])
        assert count <= len(self.free), f"{count} pages asked for, {len(self.free)} free"
        pages = [heapq.heappop(self.free) for _ in range(count)]
        runs: list[list[int]] = []  # slab, start, end
        for slab, at in (self.slab_of[page] for page in pages):
            if runs and runs[-1][0] == slab and runs[-1][2] == at:
                runs[-1][2] += PAGE_BYTES
            else:
                runs.append([slab, at, at + PAGE_BYTES])
        return Extent([self.slabs[slab][start:end] for slab, start, end in runs], pages)

    def give_back(self, extent: Extent) -> None:
        """Frees the memory of a file. No copy from it may be under way."""
        for page in extent.pages:
            heapq.heappush(self.free, page)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        except RuntimeError as error:
            raise EngineError(
                f"{nbytes / 2**30:.3g} GiB of host memory can't be allocated ({error}). Lower host_cache_gib."
            ) from error
