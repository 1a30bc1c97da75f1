"""Sources of text: one in each file. A workload cuts memories and queries to token counts."""

from experiments.workloads.base import Cell, Workload
from experiments.workloads.cut import as_query, cut_memories
from experiments.workloads.python_docs import QUESTIONS, docs_text, docs_texts

__all__ = ["QUESTIONS", "Cell", "Workload", "as_query", "cut_memories", "docs_text", "docs_texts"]
