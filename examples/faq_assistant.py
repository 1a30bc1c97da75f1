"""A FAQ assistant: answers from a folder of text files, and gets faster as the scheduler learns which it needs.

    python examples/faq_assistant.py examples/faq < examples/faq_questions.txt

A question a line. Each answer's time to first token stands beside that of the same prompt with nothing cached.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from kvmem import KVCacheMemory, KVCacheMemoryConfig, TextualMemoryItem
from kvmem.cache import dynamic_cache
from kvmem.cache.dynamic_cache import CacheView
from kvmem.scheduler.scheduler import MemScheduler

LLM = {"backend": "huggingface", "config": {"model_name_or_path": "smollm2-135m"}}


def words(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"\w{3,}", text.lower())}


def closest(question: str, memories: list[TextualMemoryItem]) -> TextualMemoryItem:
    """The text that shares most words with the question, rare words counting more. Your retrieval goes here."""
    texts = [words(memory.memory) for memory in memories]
    worth = {word: 1 / sum(word in text for text in texts) for word in set().union(*texts)}
    return max(zip(memories, texts, strict=True), key=lambda pair: sum(worth[w] for w in words(question) & pair[1]))[0]


def answer(scheduler: MemScheduler, question: str, cache: CacheView, length: int = 24) -> tuple[str, float]:
    """The answer, of `length` tokens at most, and the milliseconds until its first one."""
    started = time.perf_counter()
    tokens = scheduler.backend.stream(question, cache, length)
    text = next(tokens).text
    ttft_ms = 1e3 * (time.perf_counter() - started)
    return text + "".join(token.text for token in tokens), ttft_ms


def main(folder: Path) -> None:
    texts = sorted(folder.glob("*.md")) or sys.exit(f"{folder} holds no text (*.md). Try examples/faq.")
    memories = [TextualMemoryItem(id=path.stem, memory=path.read_text()) for path in texts]
    memory = KVCacheMemory(KVCacheMemoryConfig(extractor_llm=LLM))
    with MemScheduler(memory, "benefit_per_byte", {"ram": 1 << 30}) as scheduler:
        for question in filter(None, map(str.strip, sys.stdin)):
            text = closest(question, memories)
            nothing = dynamic_cache.empty_view(scheduler.index.tokens(text), scheduler.backend.model_config)
            _, direct_ms = answer(scheduler, question, nothing, length=1)
            with scheduler.view([text]) as cache:
                place = "KV" if cache.get_seq_length() else "text"
                said, ttft_ms = answer(scheduler, question, cache)
            scheduler.observe(text, question)
            scheduler.tick()  # between two questions here; scheduler.start() does it in a thread of its own
            print(f"{question}\n{said}\n[{text.id} as {place}: {ttft_ms:.0f} ms, without memory: {direct_ms:.0f} ms]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__))
