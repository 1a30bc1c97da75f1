"""The published TTFT tables, one CSV file each. A new CSV file is found by itself."""

from experiments.results.published.cells import NOT_STATED, PublishedRow, beside, tables

__all__ = ["NOT_STATED", "PublishedRow", "beside", "tables"]
