"""What the checks of an open model cost an answer.

python -m tests.identity.cost_of_checks             SmolLM2-135M, on the CPU
python -m tests.identity.cost_of_checks qwen3-8b    random weights of a published shape, on the GPU
python -m tests.identity.cost_of_checks qwen3-8b FOLDER    with the tokenizer of a folder

Prints the microseconds of the two checks, and the share of a 40 ms answer that those of one answer take on
`huggingface`: of the weights in `get_cache`, of everything in `generate`. Then it measures how much longer an answer of
one token takes on `hf_graph` with the check of the weights than without: in its place, where the GPU computes
meanwhile, and before the prompt, where nothing hides it. The three take turns in one process.
"""

from __future__ import annotations

import statistics
import sys
import time
import timeit
from collections.abc import Callable

import torch

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache import FunctionWatch, ModelWatch
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.graph.config import GraphConfig
from kvmem.models import loading

ANSWER_S = 0.040
ROUNDS = 300
MEMORY = "The cellar holds four barrels of cider, and the attic holds none at all. " * 30
QUERY = "Where is the cider?"


def main(shape: str | None, tokenizer: str | None) -> None:
    device, dtype = (torch.device("cuda"), torch.bfloat16) if shape else (torch.device("cpu"), torch.float32)
    loaded = loading.load(f"random:{shape}" if shape else "smollm2-135m", device, dtype, tokenizer=tokenizer)
    weights, function = (_seconds(watch(loaded.model).changed) for watch in (ModelWatch, FunctionWatch))
    tensors = len(list(loaded.model.parameters()))
    share = 100 * (2 * weights + function) / ANSWER_S
    print(f"{tensors} parameters: {weights * 1e6:.0f} µs the weights, {function * 1e6:.0f} µs the function;", end=" ")
    print(f"{share:.2f}% of a {ANSWER_S * 1e3:.0f} ms answer on huggingface")
    on_hf_graph(HFGraphBackend(loaded, config=GraphConfig(capacity_tokens=2048)))


def _seconds(check: Callable[[], object]) -> float:
    return min(timeit.repeat(check, number=200, repeat=9)) / 200


def on_hf_graph(backend: HFGraphBackend) -> None:
    memory = KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "hf_graph", "config": {}}), backend)
    item = memory.extract(MEMORY)
    memory.add(item)
    view = memory.get_cache(item.kv_cache_id)
    checked = backend.guard.check_weights

    def answer(arm: str) -> float:
        started = time.perf_counter()
        if arm == "before":
            checked()
        if arm != "in place":
            backend.guard.check_weights = backend.guard.check_mode  # type: ignore[method-assign]
        backend.generate(QUERY, view, 1)
        backend.guard.check_weights = checked  # type: ignore[method-assign]
        return time.perf_counter() - started

    arms = ("without", "in place", "before")
    for arm in arms * 5:
        answer(arm)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for i in range(ROUNDS):
        for arm in arms[i % 3 :] + arms[: i % 3]:
            seconds[arm].append(answer(arm))
    without = statistics.median(seconds["without"])
    print(f"hf_graph, {item.metadata.token_count} tokens in place: {without * 1e3:.2f} ms without the check")
    for arm in arms[1:]:
        added = [with_it - alone for with_it, alone in zip(seconds[arm], seconds["without"], strict=True)]
        quarter, half, three_quarters = (q * 1e6 for q in statistics.quantiles(added, n=4))
        ratio = statistics.median(seconds[arm]) / without
        print(f"  check {arm}: {half:+.0f} µs (quartiles {quarter:+.0f}, {three_quarters:+.0f}), {ratio:.4f} times")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0] if given else None, given[1] if len(given) > 1 else None)
