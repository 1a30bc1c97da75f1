"""The token counts of the published vLLM table on a GPU, and twelve smaller cells on a CPU."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import field
from itertools import islice
from pathlib import Path

import torch
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.results import formatting
from experiments.workloads.base import Cell, Workload
from experiments.workloads.grid import grid
from experiments.workloads.python_docs import docs_texts
from kvmem.prompt import PromptTemplate

TABLE = Path(__file__).parents[1] / "results" / "published" / "vllm_ttft.csv"
CPU_COUNTS = [128, 256, 512], [32, 64, 128, 256]
"""Memory and prompt token counts for a machine without a GPU. Two cores prefill them in about a second."""


def published_counts() -> tuple[list[int], list[int]]:
    """The table's memory and prompt token counts, in its order."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    memories = dict.fromkeys(int(row["memory_tokens"]) for row in rows)
    return list(memories), list(dict.fromkeys(int(row["prompt_tokens"]) for row in rows))


@dataclass(config=ConfigDict(extra="forbid"))
class PublishedVLLM(Workload):
    """Twelve cells, cut from CPython's documentation. Their labels are token counts, as in the published table.

    context_tokens, query_tokens: null uses the published counts (500/1000/2000 × 500/1000/2000/4000) on a machine with
        a GPU, and 128/256/512 × 32/64/128/256 without one.
    """

    context_tokens: list[PositiveInt] | None = field(default=None)
    query_tokens: list[PositiveInt] | None = field(default=None)
    memories: PositiveInt = 1
    seed: int = 0
    max_cells: PositiveInt | None = None

    def cells(self, template: PromptTemplate, separator: str) -> Sequence[Cell]:
        contexts, queries = published_counts() if torch.cuda.is_available() else CPU_COUNTS
        cells = grid(
            self.context_tokens or contexts,
            self.query_tokens or queries,
            lambda i: docs_texts(self.seed, i, self.memories),
            template,
            separator,
            "published_vllm",
            lambda counts: {count: formatting.count(count) for count in counts},
        )
        return list(islice(cells, self.max_cells))
