"""One rank of a model under torchrun: builds memories, injects those that another built, and tells what it answered."""

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
    memory.add([memory.extract(text) for text, _ in order["asked"]])
    told: dict[str, Any] = {
        "ids": [item.kv_cache_id for item in memory.get_all()],
        "bytes": [item.metadata.kv_bytes for item in memory.get_all()],
        "fingerprint": memory.backend.fingerprint.model_dump(),
        "built": answers(memory, order["asked"]),
    }
    memory.dump(folder / "of two")
    memory.load(folder / "of one")
    told["heads"] = [layers_of(item.kv_cache)[0][0].shape[1] for item in memory.get_all()]
    told["injected"] = answers(memory, order["asked"])
    try:
        memory.dump(folder / "taken")  # what only the first rank finds out
    except StorageError as error:
        told["refused"] = type(error).__name__
    try:
        memory.load(folder / ("of one" if memory.backend.rank == 0 else "nowhere"))  # a disk that not all nodes share
    except StorageError as error:
        told["not everywhere"] = str(error)
    try:
        MemScheduler(memory, "lru", {"ram": 10**9})
    except ConfigError as error:
        told["not planned for"] = str(error)
    try:
        memory.backend.build(order["asked"][0][0], between_layers=lambda: None)
    except ConfigError as error:
        told["not paused"] = str(error)
    told["prefill_s"] = memory.backend.measure_prefill([4, 8])
    spread = KVCacheMemory(KVCacheMemoryConfig(extractor_llm=llm | {"config": RANDOM}))
    told["random"] = [spread.backend.fingerprint.model_dump(), first_logits(spread)]
    (folder / f"rank {memory.backend.rank}.json").write_text(json.dumps(told))


def answers(memory: KVCacheMemory, asked: list[list[str]]) -> list[tuple[int, ...]]:
    """Behind each memory its question's, and behind all of them, merged, the first one's."""
    ids = [item.kv_cache_id for item in memory.get_all()]
    behind = [(memory.get_cache(one), query) for one, (_, query) in zip(ids, asked, strict=True)]
    told = []
    for cache_view, query in [*behind, (memory.get_cache(ids), asked[0][1])]:
        answer = memory.backend.generate(query, cache_view, NEW_TOKENS)
        assert answer.cached_tokens > 0
        told.append(answer.token_ids)
    return told


def first_logits(memory: KVCacheMemory) -> list[float]:
    """Of every hundredth token, behind a question."""
    logits_V, _ = memory.backend.prefill(memory.backend.split("Which names are bound here?"))
    return logits_V[::100].tolist()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
