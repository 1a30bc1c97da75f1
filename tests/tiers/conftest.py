"""A remote store that can be down, on a real file system."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem


class FailingLink(LocalFileSystem):
    """A folder that fails while `down` is set, and counts its requests."""

    protocol = "failinglink"
    down = False
    error: type[Exception] = ConnectionError
    requests = 0

    def _check(self) -> None:
        FailingLink.requests += 1
        if type(self).down:
            raise type(self).error("connection refused")

    def get_file(self, rpath: str, lpath: str, **more: object) -> None:
        self._check()
        super().get_file(rpath, lpath, **more)

    def rm_file(self, path: str) -> None:
        self._check()
        super().rm_file(path)


fsspec.register_implementation("failinglink", FailingLink, clobber=True)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[str]:
    FailingLink.down, FailingLink.error = False, ConnectionError
    yield f"failinglink://{tmp_path}/cold"
    FailingLink.down = False
