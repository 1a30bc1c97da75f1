"""One rank of a run on several: torchrun starts `python -m experiments.execution.rank_worker ORDER` (see `ranks`)."""

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
    """The cells that the first process measures, beside it; EngineError where one fails here and not there."""
    bench = config.scenario.open(config)
    cells = named(config.scenario.cells(bench))
    for name in agreed(list(cells)):
        went_well = all(row.status == "done" for row in measured(config, bench, cells[name]))
        if agreed(went_well) != went_well:
            raise EngineError(f"The ranks parted at the cell {name}: it failed on one of them alone.")


def main(order: ranks.Order) -> int:
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
