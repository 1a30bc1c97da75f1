from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm


@pytest.fixture(scope="session")
def a_slurm() -> Iterator[slurm.Slurm]:
    """A Slurm on this machine, started for this test session."""
    if reason := slurm.why_not():
        pytest.skip(f"no Slurm here: {reason}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # a short path: that of a socket has at most 108 bytes
        started = slurm.start(Path(folder))
        try:
            yield started
        finally:
            started.down()
