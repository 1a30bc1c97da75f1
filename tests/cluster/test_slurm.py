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
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_survives_killed_and_preempted_jobs(a_slurm: Slurm, tmp_path: Path) -> None:
    first = start(tmp_path, a_slurm.env, *SWEEP)
    before = _disturb(a_slurm, tmp_path, first)
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

    again = start(tmp_path, a_slurm.env, *SWEEP, "hydra.launcher.mem_gb=4")
    output, _ = again.communicate()
    assert jobs_in(output).keys() == {OUT_OF_MEMORY, KILLED}, output
    assert "4 of 4 jobs finished" in output
    assert {job: rows_text(sweep / str(job)) for job in whole} == whole
    assert rows_text(sweep / str(KILLED)).startswith(before[KILLED])
    rows = is_whole(sweep)
    assert [row.model for row in rows[:: len(rows) // 2]] == ["SmolLM2-135M-Instruct", "tiny"]
    assert again.returncode == status_of(rows), output


def _disturb(slurm: Slurm, folder: Path, sweep_command: subprocess.Popen[str]) -> dict[int, str]:
    """Preempts one job and kills another, each once it has a row; returns the rows that each had."""
    before: dict[int, str] = {}
    preempted_process: int | None = None
    while len(before) < 2:
        assert sweep_command.poll() is None, f"only {list(before)} had a row to lose"
        time.sleep(0.05)
        if (sweep := sweep_folder(folder)) is None:
            continue
        rows = {job: rows_text(sweep / str(job)) for job in (PREEMPTED, KILLED)}
        if PREEMPTED not in before and rows[PREEMPTED]:
            preempted_process = writer(sweep / str(PREEMPTED))
            wanted = ("--gres=gpu:2", "--cpus-per-task=1", "--mem=100M", "--output=/dev/null", "--wrap=sleep 1")
            assert slurm.ask("sbatch", "-p", "high", *wanted)
            before[PREEMPTED] = rows[PREEMPTED]
        process = writer(sweep / str(KILLED))
        if KILLED not in before and rows[KILLED] and not _alive(preempted_process) and _alive(process):
            kill(process)
            before[KILLED] = rows_text(sweep / str(KILLED))
    return before


def _alive(process: int | None) -> bool:
    return process is not None and psutil.pid_exists(process)
