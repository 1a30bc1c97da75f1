"""A script for one rank under torchrun: builds memories, injects those of another process, and writes its answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache.dynamic_cache import layers_of
from kvmem.errors import ConfigError, StorageError
from kvmem.scheduler.scheduler import MemScheduler

NEW_TOKENS = 12
RANDOM = {"model_name_or_path": "random:tiny_wide", "dtype": "float32"}


def main(order: dict[str, Any]) -> None:
    llm = {"backend": "hf_ranks", "config": {"model_name_or_path": order["model"], "dtype": "float32"}}
    memory = KVCacheMemory(KVCacheMemoryConfig(extractor_llm=llm, merge=order["merge"]))
    folder = Path(order["folder"])
    memory.add([memory.extract(text) for text, _ in order["pairs"]])
    result: dict[str, Any] = {
        "ids": [item.kv_cache_id for item in memory.get_all()],
        "bytes": [item.metadata.kv_bytes for item in memory.get_all()],
        "fingerprint": memory.backend.fingerprint.model_dump(),
        "built": answers(memory, order["pairs"]),
    }
    memory.dump(folder / "of two")
    memory.load(folder / "of one")
    result["heads"] = [layers_of(item.kv_cache)[0][0].shape[1] for item in memory.get_all()]
    result["injected"] = answers(memory, order["pairs"])
    try:
        memory.dump(folder / "taken")  # only the first rank writes, and finds that it fails
    except StorageError as error:
        result["refused"] = type(error).__name__
    try:
        memory.load(folder / ("of one" if memory.backend.rank == 0 else "nowhere"))  # a disk that only one node has
    except StorageError as error:
        result["not everywhere"] = str(error)
    try:
        MemScheduler(memory, "lru", {"ram": 10**9})
    except ConfigError as error:
        result["not planned for"] = str(error)
    try:
        memory.backend.build(order["pairs"][0][0], between_layers=lambda: None)
    except ConfigError as error:
        result["not paused"] = str(error)
    result["prefill_s"] = memory.backend.measure_prefill([4, 8])
    spread = KVCacheMemory(KVCacheMemoryConfig(extractor_llm=llm | {"config": RANDOM}))
    result["random"] = [spread.backend.fingerprint.model_dump(), first_logits(spread)]
    (folder / f"rank {memory.backend.rank}.json").write_text(json.dumps(result))


def answers(memory: KVCacheMemory, pairs: list[list[str]]) -> list[tuple[int, ...]]:
    """The answer to each memory's question, and to the first question with all memories merged."""
    ids = [item.kv_cache_id for item in memory.get_all()]
    prompts = [(memory.get_cache(one), query) for one, (_, query) in zip(ids, pairs, strict=True)]
    result = []
    for cache_view, query in [*prompts, (memory.get_cache(ids), pairs[0][1])]:
        answer = memory.backend.generate(query, cache_view, NEW_TOKENS)
        assert answer.cached_tokens > 0
        result.append(answer.token_ids)
    return result


def first_logits(memory: KVCacheMemory) -> list[float]:
    """The logits of every hundredth token of the vocabulary, for a question without a memory."""
    logits_V, _ = memory.backend.prefill(memory.backend.split("Which names are bound here?"))
    return logits_V[::100].tolist()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
