"""A disk that is full or read-only, and a limit for the size of a file: the error is named, and old files stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.mounts import why_not, with_disk

CHECKOUT = Path(__file__).parents[2]
OPTIONS = {"full": "size=8m", "read-only": "size=64m", "limited": ""}
REFUSED = {
    "full": ["safetensors", "pickle", "disk", "disk_int8", "cold"],
    "limited": ["safetensors", "pickle", "disk", "disk_int8", "cold"],
    "read-only": ["safetensors", "pickle", "tiers"],
}


@pytest.mark.parametrize("fault", OPTIONS)
def test_no_writer_loses_anything(tmp_path: Path, fault: str) -> None:
    command = [sys.executable, "-m", "tests.faults.failing_disk", str(tmp_path), fault]
    if OPTIONS[fault]:
        if why_not():
            pytest.skip(f"no disk of its own for a command here: {why_not()}")
        command = with_disk(tmp_path, OPTIONS[fault], command)
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{what} refused" for what in REFUSED[fault]]), (
        done.stderr
    )
