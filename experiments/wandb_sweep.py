"""A sweep file for W&B's agents: `python -m experiments.wandb_sweep OVERRIDES > sweep.yaml; wandb sweep sweep.yaml`.

W&B's server hands out the numbers of the sweep's jobs, one to each agent that asks. A job's folder is the one that
`python -m experiments.run -m` with the same overrides gives it, so that either goes on where the other left off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import yaml

from experiments import run
from experiments.config import compose
from experiments.execution import sweep
from experiments.sinks import WandB
from kvmem.errors import ConfigError

JOB = "job"
ONLINE = "sink.mode=online"


def sweep_file(overrides: Sequence[str]) -> str:
    """The YAML of a sweep over all jobs of `overrides`; ConfigError for a wrong job, or one that W&B would not see."""
    compose.check(["-m", *overrides])
    jobs = compose.expand(list(overrides))
    card = compose.validate(compose.compose(jobs[0]))
    if not isinstance(card.sink, WandB):
        raise ConfigError("W&B's agents report to W&B, and this sink is another. Leave sink=wandb.")
    told = [] if card.sink.mode != "auto" else [ONLINE]
    return yaml.safe_dump(
        {
            "name": sweep.folder_of(overrides).name,
            "project": card.sink.project,
            **({"entity": card.sink.entity} if card.sink.entity else {}),
            "program": "experiments/wandb_sweep.py",  # W&B wants one, and shows it
            "method": "grid",
            "parameters": {JOB: {"values": list(range(len(jobs)))}},
            "command": ["${env}", "python", "-m", "experiments.wandb_sweep", "${args_no_hyphens}", *overrides, *told],
        },
        sort_keys=False,
        width=1000,
    )


def main(arguments: Sequence[str]) -> int:
    """Prints the sweep file; with `job=N` first, as an agent says it, runs that job instead."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        arguments = [argument for argument in arguments if argument not in ("-m", "--multirun")]  # it is always a sweep
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
        return run.WRONG_COMMAND
    sys.argv[1:] = [*jobs[int(number)], f"hydra.run.dir={folder}"]
    return run.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
