"""The published TTFT tables, one CSV file each. A new CSV file is found by itself."""

from experiments.results.published.cells import PublishedRow, beside, tables

__all__ = ["PublishedRow", "beside", "tables"]
