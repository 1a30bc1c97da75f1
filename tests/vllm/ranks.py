"""An engine of a given tensor-parallel size, in its own process, that builds memories and injects those of others.

It runs as a module, with its steps as JSON, so that the engine's workers can import it. The result of each step is
written into the step's folder last, so another engine can wait for it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from experiments.measurement import Trace, grade, reference_forward
from kvmem import KVCacheItem, KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache.dynamic_cache import layers_of
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.requests import GenerationRequest, VLLMGeneration
from kvmem.errors import InjectionError
from kvmem.prompt import TokenizedPrompt

NEW_TOKENS = 16
BUILT, INJECTED = "built.json", "injected.json"
MORE = [{"role": "user", "content": "Thank you."}, {"role": "assistant", "content": "You are welcome."}]


def main(order: dict[str, Any]) -> None:
    """order: `config` of the engine, `steps` as (kind, folder), `turns` of each memory, `queries`."""
    memory = KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "vllm", "config": order["config"]}))
    for step, name in order["steps"]:
        folder = Path(name)
        if step == "build":
            memory.delete_all()
            memory.add([memory.extract(turns) for turns in order["turns"]])
            memory.dump(folder)
            write(folder / BUILT, answers(memory, order["queries"]))
        else:
            while not (folder / BUILT).exists():  # another engine may still be building
                time.sleep(0.1)
            memory.load(folder)
            write(folder / INJECTED, answers(memory, order["queries"]))
            refuses_damage(memory, order["queries"][0])


def answers(memory: KVCacheMemory, queries: list[str]) -> list[dict[str, Any]]:
    """For each memory: the equality grade of its answer against the direct answer, how many tokens were injected, and
    whether this engine saves the same bits again from the blocks that it injected them into."""
    engine = memory.backend
    assert isinstance(engine, VLLMBackend)
    results = []
    for item, query in zip(memory.get_all(), queries, strict=True):
        cache_view = memory.get_cache(item.kv_cache_id)
        prompt = engine.split(query, cache_view)
        engine.reset()
        counts = engine.answer_prompt(prompt, cache_view)
        engine.reset()
        reused = engine.greedy(prompt, cache_view, NEW_TOKENS)
        engine.reset()
        direct = engine.greedy(TokenizedPrompt((), prompt.ids), None, NEW_TOKENS)
        results.append(
            {
                "tokens": reused.token_ids,
                "grade": graded(engine, prompt, direct, reused),
                "injected": [counts.local_tokens, counts.injected_tokens],
                "memory_tokens": item.metadata.token_count,
                "same_bits": same_bits_again(memory, item),
            }
        )
    return results


def refuses_damage(memory: KVCacheMemory, query: str) -> None:
    """A damaged file is the error of its request on all ranks, and the engine goes on."""
    engine = memory.backend
    assert isinstance(engine, VLLMBackend)
    damaged, sound = memory.get_all()[:2]
    path = engine.store.file_of(damaged).path
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    engine.reset()
    requests = [GenerationRequest(query, engine.store.view(item), 4) for item in (damaged, sound)]
    error, answer = engine.generate_batch(requests)
    assert isinstance(error, InjectionError) and path.name in str(error), error
    assert isinstance(answer, VLLMGeneration) and answer.injected_tokens == sound.metadata.token_count, answer
    state = engine.host_cache()
    assert state.failed_reads == 1 and state.reads > 0 and 0 < state.used_bytes <= state.budget_bytes, state


def graded(engine: VLLMBackend, prompt: TokenizedPrompt, direct: Any, reused: Any) -> str:
    first, other = (Trace(answer.token_ids, answer.logits_SV, answer.complete) for answer in (direct, reused))
    reference = reference_forward(engine)
    return grade(first, other, lambda at: reference.logits(prompt.ids, first.token_ids, at), engine.dtype).grade


def same_bits_again(memory: KVCacheMemory, item: KVCacheItem) -> bool:
    longer = memory.extract(MORE, base=item)
    tokens = item.metadata.token_count
    return all(
        torch.equal(mine.view(torch.int8), again[:, :, :tokens].contiguous().view(torch.int8))
        for pair, longer_pair in zip(layers_of(item.kv_cache), layers_of(longer.kv_cache), strict=True)
        for mine, again in zip(pair, longer_pair, strict=True)
    )


def write(path: Path, values: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values))
    partial.rename(path)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an engine that did not start may wait for its workers forever
