"""Experiments measure what injecting memories saves. Every figure has a verdict.

`python -m experiments.run` is the command line. `run_experiment` does the same from Python:

    from experiments import run_experiment
    rows = run_experiment("model=tiny", "mode=quick")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.config import RunConfig
    from experiments.execution import run_experiment

__all__ = ["RunConfig", "run_experiment"]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import experiments.hardware` loads neither Hydra nor an engine."""
    if name == "RunConfig":
        from experiments.config import RunConfig

        return RunConfig
    if name == "run_experiment":
        from experiments.execution import run_experiment

        return run_experiment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
