"""The token counts of the published tables, with CPython's documentation as text. The tables state only lengths."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.workloads.base import Cell, Workload
from experiments.workloads.grid import grid
from experiments.workloads.python_docs import docs_texts
from kvmem.prompt import PromptTemplate

TABLE = Path(__file__).parents[1] / "results" / "published" / "huggingface_ttft.csv"


def published_counts() -> tuple[list[int], list[int]]:
    """The table's context and query token counts, in its order. Its query counts are means, so they are rounded."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    contexts = dict.fromkeys(round(float(row["context_tokens"])) for row in rows)
    queries = dict.fromkeys(round(float(row["query_tokens"])) for row in rows)
    return list(contexts), list(queries)


@dataclass(config=ConfigDict(extra="forbid"))
class Published(Workload):
    """The nine cells of the published table, from long to short, cut from CPython's documentation.

    memories: the number of memories that make up a context. The configured merge joins them.
    """

    memories: PositiveInt = 1
    seed: int = 0
    max_cells: PositiveInt | None = None

    def cells(self, template: PromptTemplate, separator: str) -> Sequence[Cell]:
        contexts, queries = published_counts()
        cells = grid(
            contexts, queries, lambda i: docs_texts(self.seed, i, self.memories), template, separator, "published"
        )
        return list(islice(cells, self.max_cells))
