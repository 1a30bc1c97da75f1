"""Sources of text: one in each file. A workload cuts memories and queries to token counts."""

from experiments.workloads.base import Cell, Workload
from experiments.workloads.cut import asked, cut_memories
from experiments.workloads.python_docs import QUESTIONS, docs_text, docs_texts

__all__ = ["QUESTIONS", "Cell", "Workload", "asked", "cut_memories", "docs_text", "docs_texts"]
