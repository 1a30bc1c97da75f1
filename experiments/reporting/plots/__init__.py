"""Plots: one in each file. A plot is drawn where the rows hold what it shows."""

from experiments.reporting.plots.base import Plot, draw, every, groups, measured, svg, tick, write_plots

__all__ = ["Plot", "draw", "every", "groups", "measured", "svg", "tick", "write_plots"]
