"""Other questions of exactly the same length, so that no timed round repeats the prompt of another."""

from __future__ import annotations

import random
import re

from kvmem.cache import MemoryTokens
from kvmem.prompt import PromptTemplate

WORDS = ("the", "one", "new", "old", "big", "red", "two", "top", "low", "hot", "day", "way", "use", "time", "work")
"""A token each in most vocabularies."""
TRIES_EACH = 40


def other_questions(
    template: PromptTemplate, tokens: MemoryTokens, question: str, count: int, seed: int = 0
) -> list[str]:
    """`question` and up to `count` - 1 others, whose prompts behind the memory `tokens` have the same two lengths.

    Each replaces words of the question by short common words. Every length is checked on the whole tokenized prompt.
    Fewer are returned where a tokenizer gives no other, and no two have the same token ids.
    """
    rng = random.Random(seed)
    prompt = template.split(tokens, question)
    found, known = [question], {prompt.ids}
    words = [match.span() for match in re.finditer(r"\b[a-z]{2,}\b", question)]
    for _ in range(TRIES_EACH * count):
        if len(found) == count or not words:
            break
        start, end = rng.choice(words)
        text = question[:start] + rng.choice(WORDS) + question[end:]
        split = template.split(tokens, text)
        if (len(split.ids), split.memory_ids) == (len(prompt.ids), prompt.memory_ids) and split.ids not in known:
            found.append(text)
            known.add(split.ids)
    return found
