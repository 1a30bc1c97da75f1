"""Text for any number of memories, and a question about each."""

from __future__ import annotations

from experiments.workloads.faq import faq_texts
from experiments.workloads.python_docs import QUESTIONS, docs_texts


def memory_text(seed: int, memory: int) -> str:
    """The text of a memory: documentation, and generated FAQs where it has no more topics. All begin differently."""
    if memory < len(QUESTIONS):
        return docs_texts(seed, memory, 1).memories[0]
    return f"Memory {memory}.\n\n{faq_texts(seed, memory, 1).memories[0]}"


def memory_question(seed: int, memory: int) -> str:
    """A question about the text of a memory."""
    if memory < len(QUESTIONS):
        return docs_texts(seed, memory, 1).question_for(()).variants[-1]
    texts = faq_texts(seed, memory, 1)
    return texts.question_for(texts.memories).variants[-1]
