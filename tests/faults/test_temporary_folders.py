"""Temporary folders of killed processes are removed by the next process, and those in use stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvmem.storage import TemporaryFolder
from tests.helpers.forking import CHECKOUT

MAKE_ONE = """
import sys, time
from pathlib import Path
from kvmem.storage import TemporaryFolder
folder = TemporaryFolder("kvmem-cold-", Path(sys.argv[1]))
(folder.path / "item.safetensors").write_bytes(bytes(1000))
print(folder.path, flush=True)
time.sleep(300)
"""


def made_long_ago(folder: Path) -> None:
    then = time.time() - 3600
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))


def test_the_folder_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE_ONE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        assert process.stdout is not None
        killed = Path(process.stdout.readline().strip())
        made_long_ago(killed)
        with TemporaryFolder("kvmem-", tmp_path):
            assert killed.is_dir(), "its process runs"
        process.send_signal(signal.SIGKILL)
    foreign = tmp_path / "kvmem-of-a-user"
    foreign.mkdir()
    (foreign / "file").touch()
    made_long_ago(foreign)
    made_long_ago(killed)
    with TemporaryFolder("kvmem-", tmp_path) as mine:
        made_long_ago(mine)
        with TemporaryFolder("kvmem-", tmp_path) as other:
            assert set(tmp_path.iterdir()) == {foreign, mine, other}
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_young_folder_without_a_holder_is_left_to_its_maker(tmp_path: Path) -> None:
    """It may be about to be locked."""
    with TemporaryFolder("kvmem-", tmp_path) as folder:
        young = tmp_path / "kvmem-new"
        young.mkdir()
        for path in folder.iterdir():
            (young / path.name).touch()
        with TemporaryFolder("kvmem-", tmp_path):
            assert young.is_dir()


def test_a_folder_goes_with_the_last_reference(tmp_path: Path) -> None:
    folder = TemporaryFolder("kvmem-", tmp_path)
    assert folder.path.is_dir()
    del folder
    assert not list(tmp_path.iterdir())
