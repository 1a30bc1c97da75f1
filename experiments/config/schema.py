"""The typed root of a run: conf/config.yaml as one dataclass, with one field for each configuration group."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from experiments.bench import Setup
from experiments.scenarios import Scenario
from experiments.sinks import Sink


@dataclass(config=ConfigDict(extra="forbid", arbitrary_types_allowed=True), kw_only=True)
class RunConfig(Setup):
    """A run: the setup that is measured, the scenario that measures it, and the sink for its rows."""

    scenario: Scenario[Any, Any]
    sink: Sink
    tracebacks: bool = False
    """Log the traceback of an error, not only its message."""
