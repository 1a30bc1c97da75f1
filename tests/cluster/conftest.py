from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm


@pytest.fixture(scope="session")
def a_slurm() -> Iterator[slurm.Slurm]:
    """A Slurm of this session's own, on this machine."""
    if reason := slurm.why_not():
        pytest.skip(f"no Slurm here: {reason}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: a socket's path has 108 bytes at most
        started = slurm.start(Path(folder))
        try:
            yield started
        finally:
            started.down()
