"""From a command line to a validated `RunConfig`."""

from experiments.config.schema import RunConfig

__all__ = ["RunConfig"]
