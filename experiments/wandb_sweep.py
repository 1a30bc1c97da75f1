"""A sweep for W&B's agents: python -m experiments.wandb_sweep OVERRIDES > sweep.yaml, then `wandb sweep sweep.yaml`.

W&B's server gives each agent the number of a job. The job has the same folder as under `python -m experiments.run -m`
with the same overrides, so each command continues a sweep that the other one started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import yaml

from experiments.config import command_line, compose
from experiments.execution import WRONG_COMMAND, sweep
from experiments.sinks import WandB
from kvmem.errors import ConfigError

JOB = "job"
ONLINE = "sink.mode=online"


def sweep_file(overrides: Sequence[str]) -> str:
    """The YAML of a sweep over all jobs of `overrides`.

    Raises ConfigError if the configuration of a job is wrong, or if its sink is not W&B.
    """
    compose.check(command_line.read(["-m", *overrides]))
    jobs = compose.expand(overrides)
    config = compose.validate(compose.compose(jobs[0]))
    if not isinstance(config.sink, WandB):
        raise ConfigError("W&B's agents need sink=wandb, and this configuration has another sink. Use sink=wandb.")
    online = [] if config.sink.mode != "auto" else [ONLINE]
    return yaml.safe_dump(
        {
            "name": sweep.folder_of(overrides).name,
            "project": config.sink.project,
            **({"entity": config.sink.entity} if config.sink.entity else {}),
            "program": "experiments/wandb_sweep.py",  # W&B requires it and shows it on the sweep's page
            "method": "grid",
            "parameters": {JOB: {"values": list(range(len(jobs)))}},
            "command": ["${env}", "python", "-m", "experiments.wandb_sweep", "${args_no_hyphens}", *overrides, *online],
        },
        sort_keys=False,
        width=1000,
    )


def main(arguments: Sequence[str]) -> int:
    """Prints the sweep file. If the first argument is `job=N`, as an agent passes it, runs that job instead."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        arguments = [argument for argument in arguments if argument not in ("-m", "--multirun")]  # implied
        if not arguments or not arguments[0].startswith(f"{JOB}="):
            print(sweep_file(arguments), end="")
            return 0
        number, overrides = arguments[0].partition("=")[2], list(arguments[1:])
        jobs = compose.expand(overrides)
        if not number.isdigit() or int(number) >= len(jobs):
            raise ConfigError(f"{JOB}={number}: this sweep has {len(jobs)} jobs, 0 to {len(jobs) - 1}.")
        folder = sweep.folder_of(overrides) / number
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_COMMAND
    command = [sys.executable, "-m", "experiments.run", *jobs[int(number)], f"hydra.run.dir={folder}"]
    os.execv(sys.executable, command)  # replaces this process, so that the agent's signals reach the run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
