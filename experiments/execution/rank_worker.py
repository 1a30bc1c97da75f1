"""One process of a run on several ranks (see ranks.py). torchrun starts it with the path of a `RankTask` file."""

from __future__ import annotations

import json
import logging.config
import os
import sys
from pathlib import Path

from omegaconf import OmegaConf

from experiments import signals
from experiments.config import RunConfig, compose
from experiments.execution import ranks
from experiments.execution.runner import cells_by_name, measure_cell, run
from experiments.measurement import from_rank0
from kvmem.errors import ConfigError, EngineError, KVMemError


def follow(config: RunConfig) -> None:
    """Measures the cells that rank 0 measures, in step with it.

    Raises EngineError if a cell fails on this rank but not on rank 0, or the other way round.
    """
    bench = config.scenario.open(config)
    cells = cells_by_name(config.scenario.cells(bench))
    for name in from_rank0(list(cells)):
        succeeded = all(row.status == "done" for row in measure_cell(config, bench, cells[name]))
        if from_rank0(succeeded) != succeeded:
            raise EngineError(f"The cell {name} failed on some ranks and succeeded on others.")


def main(task: ranks.RankTask) -> int:
    """Runs as rank 0, or follows it. Returns the exit status."""
    signals.leave_to(task.started_by)
    config = compose.validate(OmegaConf.create(task.resolved))
    try:
        if os.environ["RANK"] == "0":
            logging.config.dictConfig(task.logging)
            run(config, Path(task.run_dir), task.resolved, task.overrides)
        else:
            follow(config)
    except KVMemError as error:
        ranks.report_failure(task.errors, ranks.RankFailure(isinstance(error, ConfigError), str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(ranks.RankTask(**json.loads(Path(sys.argv[1]).read_text()))))
