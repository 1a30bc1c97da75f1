"""A FAQ assistant: answers from a folder of text files, and gets faster as the scheduler learns which it needs often.

    python examples/faq_assistant.py examples/faq < examples/faq_questions.txt

Reads one question per line. Prints each answer with its time to first token, beside that of the same prompt without a
cache.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from kvmem import KVCacheMemory, KVCacheMemoryConfig, MemScheduler, TextualMemoryItem
from kvmem.cache import CacheView, dynamic_cache

LLM = {"backend": "huggingface", "config": {"model_name_or_path": "smollm2-135m"}}


def words(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"\w{3,}", text.lower())}


def closest(question: str, memories: list[TextualMemoryItem]) -> TextualMemoryItem:
    """The text that shares most words with the question; rare words count more. Put your own retrieval here."""
    texts = [words(memory.memory) for memory in memories]
    worth = {word: 1 / sum(word in text for text in texts) for word in set().union(*texts)}
    return max(zip(memories, texts, strict=True), key=lambda pair: sum(worth[w] for w in words(question) & pair[1]))[0]


def answer(scheduler: MemScheduler, question: str, cache: CacheView, length: int = 24) -> tuple[str, float]:
    """An answer of at most `length` tokens, and the milliseconds until its first token."""
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
            no_cache = dynamic_cache.empty_view(scheduler.index.tokens(text), scheduler.backend.model_config)
            _, direct_ms = answer(scheduler, question, no_cache, length=1)
            with scheduler.view([text]) as cache:
                form = "KV" if cache.get_seq_length() else "text"
                reply, ttft_ms = answer(scheduler, question, cache)
            scheduler.observe(text, question, cache)  # keeps the KV that the answer computed
            scheduler.tick()  # here between two questions; scheduler.start() does it in a background thread
            print(f"{question}\n{reply}\n[{text.id} as {form}: {ttft_ms:.0f} ms, without memory: {direct_ms:.0f} ms]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__))
