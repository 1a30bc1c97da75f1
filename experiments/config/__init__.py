"""Turns a command line, overrides or Python objects into a validated `RunConfig`."""

from experiments.config.schema import RunConfig

__all__ = ["RunConfig"]
