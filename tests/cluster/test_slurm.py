"""A sweep on a real Slurm: one job is killed, one runs out of memory, one is preempted; then the command runs again."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.slurm import Slurm
from tests.cluster.sweeps import finished, is_whole, jobs_in, kill, rows_text, start, status_of, sweep_folder, writer

SWEEP = ("model=smollm2_135m,tiny", "launcher=slurm", "hydra.launcher.gres=gpu:1", "hydra.launcher.cpus_per_task=1")
PREEMPTED, OUT_OF_MEMORY, KILLED, SIBLING = range(4)


@pytest.mark.slurm
@pytest.mark.xdist_group("cluster")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_survives_killed_and_preempted_jobs(a_slurm: Slurm, tmp_path: Path) -> None:
    release = tmp_path / "release"
    held = f"+sink.jobs=[{PREEMPTED},{KILLED}]"
    sweep_of = (*SWEEP, "sink._target_=tests.cluster.holding_sink.Holding", f"+sink.until={release}", held)
    first = start(tmp_path, a_slurm.env, *sweep_of)
    before = _disturb(a_slurm, tmp_path, first)
    release.touch()
    output, _ = first.communicate()
    sweep = sweep_folder(tmp_path)
    assert sweep is not None and first.returncode == 1, output
    jobs = jobs_in(output)
    shown = {index: a_slurm.ask("scontrol", "show", "job", job) or "" for index, job in jobs.items()}
    assert all("TresPerNode=gres:gpu:1" in job_text for job_text in shown.values()), shown
    assert "Restarts=0" not in shown[PREEMPTED] and "JobState=COMPLETED" in shown[PREEMPTED], shown
    reported = "".join(path.read_text() for path in (sweep / ".submitit" / jobs[OUT_OF_MEMORY]).glob("*.err"))
    assert "exceeded memory limit" in reported and "JobState=COMPLETED" not in shown[OUT_OF_MEMORY], reported
    assert "JobState=FAILED" in shown[KILLED] and "JobState=COMPLETED" in shown[SIBLING], shown
    assert [finished(sweep / str(job)) for job in range(4)] == [True, False, False, True]
    assert "2 of 4 jobs finished" in output and "not finished: 1, 2" in output
    assert rows_text(sweep / str(PREEMPTED)).startswith(before[PREEMPTED])
    whole = {job: rows_text(sweep / str(job)) for job in (PREEMPTED, SIBLING)}

    again = start(tmp_path, a_slurm.env, *sweep_of, "hydra.launcher.mem_gb=4")
    output, _ = again.communicate()
    assert jobs_in(output).keys() == {OUT_OF_MEMORY, KILLED}, output
    assert "4 of 4 jobs finished" in output
    assert {job: rows_text(sweep / str(job)) for job in whole} == whole
    assert rows_text(sweep / str(KILLED)).startswith(before[KILLED])
    rows = is_whole(sweep)
    assert [row.model for row in rows[:: len(rows) // 2]] == ["SmolLM2-135M-Instruct", "tiny"]
    assert again.returncode == status_of(rows), output


def _disturb(slurm: Slurm, folder: Path, sweep_command: subprocess.Popen[str]) -> dict[int, str]:
    """Preempts one job and kills another, each while it is held at its second row; returns the first row of each."""
    before = {PREEMPTED: _first_row(folder, PREEMPTED, sweep_command)}
    preempting = ("--gres=gpu:2", "--cpus-per-task=1", "--mem=100M", "--output=/dev/null", "--wrap=sleep 1")
    assert slurm.ask("sbatch", "--wait", "-p", "high", *preempting, timeout_s=120)  # returns when that job has ended
    before[KILLED] = _first_row(folder, KILLED, sweep_command)
    sweep = sweep_folder(folder)
    assert sweep is not None
    kill(writer(sweep / str(KILLED)))
    return before


def _first_row(folder: Path, job: int, sweep_command: subprocess.Popen[str]) -> str:
    """Waits until a running process holds the job at its second row."""
    while True:
        assert sweep_command.poll() is None, f"job {job} was not held"
        if (sweep := sweep_folder(folder)) is not None:
            lines = rows_text(sweep / str(job)).splitlines(keepends=True)
            if len(lines) > 1 and _alive(writer(sweep / str(job))):
                return lines[0]
        time.sleep(0.05)


def _alive(process: int | None) -> bool:
    return process is not None and psutil.pid_exists(process)
