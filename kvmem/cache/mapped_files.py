"""Files whose pages are the tensors of a cache, and the check that such a file is still what was verified.

A mapping is private, but a page that was not touched yet shows what the file holds now: a file that is overwritten in
place changes the tensors, and reading behind the end of one that was cut off kills the process (SIGBUS). kvmem itself
never writes into a file: it replaces and deletes files, which leaves the mapped bytes as they are.
"""

from __future__ import annotations

import math
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import torch

from kvmem.errors import ChangedFileError, DamagedFileError

CLOCK_TICK_NS = 20_000_000
"""Times of files advance in steps, of 10 ms or less on local file systems. A write within the step of the last one
leaves the time as it is, so a file that is younger than this is verified again at its next use."""


class MappedFile(mmap.mmap):
    """A whole file, mapped copy-on-write. It lives as long as a tensor of it."""

    path: Path
    _verify: Callable[[memoryview], None]
    _descriptor: int
    _stat: os.stat_result
    _settled: bool

    @classmethod
    def verified(cls, descriptor: int, path: Path, verify: Callable[[memoryview], None]) -> Self:
        """Maps the open file and calls `verify` with its bytes, which raises DamagedFileError for wrong ones."""
        mapped = cls(descriptor, 0, access=mmap.ACCESS_COPY)
        mapped.madvise(mmap.MADV_WILLNEED)
        mapped.path, mapped._verify, mapped._descriptor = path, verify, os.dup(descriptor)
        weakref.finalize(mapped, os.close, mapped._descriptor)
        mapped._verify_now(os.fstat(descriptor))
        return mapped

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], at: int) -> torch.Tensor:
        """The tensor whose bytes begin at byte `at` of the file; not copied."""
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self, dtype=dtype, count=math.prod(shape), offset=at)
        _by_address[flat.untyped_storage().data_ptr()] = self
        return flat.view(shape)

    def check(self) -> None:
        """Raises ChangedFileError if the file is not what was verified. Takes 2 µs while nothing happened to it.

        Signs are its size and its times of change. If one of them differs, all bytes are verified again, so a file that
        was only touched passes.
        """
        stat = os.fstat(self._descriptor)
        if self._settled and not self._differs(stat):
            return
        if stat.st_size < len(self):
            raise self._error("cut off")
        try:
            self._verify_now(stat)
        except DamagedFileError:
            raise self._error("overwritten") from None

    def _differs(self, stat: os.stat_result) -> bool:
        old = self._stat
        if (stat.st_size, stat.st_mtime_ns) != (old.st_size, old.st_mtime_ns):
            return True
        return stat.st_nlink > 0 and stat.st_ctime_ns != old.st_ctime_ns  # a deleted file can't be opened to be changed

    def _verify_now(self, stat: os.stat_result) -> None:
        started_ns = time.time_ns()
        self._verify(memoryview(self))
        age_ns = started_ns - max(stat.st_mtime_ns, stat.st_ctime_ns)
        self._stat, self._settled = stat, abs(age_ns) > CLOCK_TICK_NS

    def _error(self, how: str) -> ChangedFileError:
        return ChangedFileError(
            f"{self.path} was {how} after it was loaded, while the memory in use is mapped from it. Load the memory "
            "from an intact file, or extract it again. Replace files by renaming, never write into them."
        )


_by_address: weakref.WeakValueDictionary[int, MappedFile] = weakref.WeakValueDictionary()
"""By the address of each mapped tensor's storage."""


def files_of(tensors: Iterable[torch.Tensor]) -> tuple[MappedFile, ...]:
    """The files that any of the tensors, or the tensors that they are views of, are mapped from."""
    if not _by_address:
        return ()
    found = (_by_address.get(tensor.untyped_storage().data_ptr()) for tensor in tensors)
    return tuple({id(file): file for file in found if file is not None}.values())
