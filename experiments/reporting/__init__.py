"""Tables, plots and the HTML report of a run."""

from experiments.reporting.pages import write_joined, write_report

__all__ = ["write_joined", "write_report"]
