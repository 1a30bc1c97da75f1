"""From a command line, overrides or Python to a validated `RunConfig`."""

from experiments.config.schema import RunConfig

__all__ = ["RunConfig"]
