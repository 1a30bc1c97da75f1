"""Workloads: sources of memories and questions, one in each file. Most cut their text to exact token counts."""

from experiments.workloads.base import Cell, Workload
from experiments.workloads.cut import as_query, cut_memories
from experiments.workloads.memory_texts import memory_question, memory_text
from experiments.workloads.other_questions import other_questions
from experiments.workloads.python_docs import QUESTIONS, docs_text, docs_texts

__all__ = [
    "QUESTIONS",
    "Cell",
    "Workload",
    "as_query",
    "cut_memories",
    "docs_text",
    "docs_texts",
    "memory_question",
    "memory_text",
    "other_questions",
]
