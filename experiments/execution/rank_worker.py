"""One process of a run of several (experiments/execution/ranks.py). torchrun starts it with the path of its order."""

from __future__ import annotations

import json
import logging.config
import os
import sys
from pathlib import Path

from omegaconf import OmegaConf

from experiments.config import RunConfig, compose
from experiments.execution import ranks
from experiments.execution.runner import measured, named, run
from experiments.measurement import agreed
from kvmem.errors import ConfigError, EngineError, KVMemError


def follow(config: RunConfig) -> None:
    """Measures the cells that rank 0 measures, in step with it. Raises EngineError if a cell fails here alone."""
    bench = config.scenario.open(config)
    cells = named(config.scenario.cells(bench))
    for name in agreed(list(cells)):
        succeeded = all(row.status == "done" for row in measured(config, bench, cells[name]))
        if agreed(succeeded) != succeeded:
            raise EngineError(f"The ranks disagree about the cell {name}: it failed on some of them only.")


def main(order: ranks.Order) -> int:
    """Runs as rank 0, or follows it; returns the exit status."""
    config = compose.validate(OmegaConf.create(order.resolved))
    try:
        if os.environ["RANK"] == "0":
            logging.config.dictConfig(order.logging)
            run(config, Path(order.run_dir), order.resolved, order.overrides)
        else:
            follow(config)
    except KVMemError as error:
        ranks.give_up(order.errors, ranks.GivenUp(isinstance(error, ConfigError), str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(ranks.Order(**json.loads(Path(sys.argv[1]).read_text()))))
