"""A sweep on a real local Ray: one job is killed, the others finish, and the same command runs the rest."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.sweeps import finished, is_whole, jobs_in, kill, rows_text, start, status_of, sweep_folder, writer

KILLED = 2


@pytest.fixture
def sweep_on_ray() -> Iterator[tuple[str, ...]]:
    """Overrides that start a separate Ray for each command: two jobs at a time, and no retries by Ray."""
    pytest.importorskip("ray", reason="no Ray here: pip install 'kvmem[ray]'")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="pip install --no-deps hydra-ray-launcher==1.2.2")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: a socket's path has 108 bytes at most
        init = {"num_cpus": 2, "include_dashboard": "false", "object_store_memory": 78643200, "_temp_dir": folder}
        own = [f"+hydra.launcher.ray.init.{name}={value}" for name, value in init.items()]
        remote = {"num_cpus": 1, "max_retries": 0}
        yield (
            "model=tiny",
            "model.seed=0,1",
            "launcher=ray",
            *own,
            *(f"hydra.launcher.ray.remote.{name}={value}" for name, value in remote.items()),
        )


@pytest.mark.xdist_group("cluster")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_survives_a_job_that_dies(sweep_on_ray: tuple[str, ...], tmp_path: Path) -> None:
    first = start(tmp_path, {}, *sweep_on_ray)
    before = ""
    while not before:
        assert first.poll() is None, "the run ended before its job was killed"
        time.sleep(0.02)
        if (sweep := sweep_folder(tmp_path)) is not None:
            before = rows_text(sweep / str(KILLED))
    assert sweep is not None
    kill(writer(sweep / str(KILLED)))
    output, _ = first.communicate()
    assert first.returncode == 1 and jobs_in(output).keys() == {0, 1, 2, 3}, output
    assert "3 of 4 jobs finished" in output and f"not finished: {KILLED}" in output
    assert f"(#{KILLED}) ended as " in output
    assert [finished(sweep / str(job)) for job in range(4)] == [True, True, False, True]
    whole = {job: rows_text(sweep / str(job)) for job in range(4) if job != KILLED}

    again = start(tmp_path, {}, *sweep_on_ray)
    output, _ = again.communicate()
    assert jobs_in(output).keys() == {KILLED}, output
    assert "4 of 4 jobs finished" in output
    assert {job: rows_text(sweep / str(job)) for job in whole} == whole
    assert rows_text(sweep / str(KILLED)).startswith(before)
    rows = is_whole(sweep)
    assert again.returncode == status_of(rows), output
