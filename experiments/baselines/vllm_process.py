"""vLLM as others run it, in a process of its own: cold and prefix-hit TTFT, and decoding, by its public API alone.

Reads a `Request` as JSON from the file of its first argument, writes a `Reply` to the file of its second. Times run
from token ids in hand to the token id on the host, around `LLM.generate`; prompts are random ids.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvmem.engines.vllm import CPU_KV_CACHE_GIB, ENVIRONMENT
from kvmem.errors import EngineError

LEFT_FREE_BYTES = 2 << 30
"""Of a GPU's free memory, for what an engine takes beside its share."""
LEAST_ID = 1000  # below lie special tokens


@dataclass(frozen=True)
class Request:
    """What to measure: `cells` are (context, query) token counts, `rounds` repeats after one that warms up."""

    model: str
    """A folder or hub name."""
    dummy_weights: bool
    """The folder holds a config alone."""
    dtype: str
    vocab: int
    cells: list[tuple[int, int]]
    rounds: int
    decode_tokens: int
    """Greedy tokens behind the longest context, for the rate of decoding."""


@dataclass(frozen=True)
class PeerCell:
    """One cell's times, and how many tokens of a hit came from the engine's prefix cache."""

    context_tokens: int
    query_tokens: int
    cold_all_s: list[float]
    hit_all_s: list[float]
    cached_tokens: int


@dataclass(frozen=True)
class Reply:
    version: str
    cells: list[PeerCell]
    decode_context_tokens: int
    decode_tokens_per_s_all: list[float]

    def cell(self, context_tokens: int, query_tokens: int) -> PeerCell | None:
        wanted = (context_tokens, query_tokens)
        return next((cell for cell in self.cells if (cell.context_tokens, cell.query_tokens) == wanted), None)


def ask(request: Request, timeout_s: float) -> Reply:
    """Starts the process and waits for it. Raises EngineError with its last words if it fails or takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        asked, replied = Path(folder) / "request.json", Path(folder) / "reply.json"
        asked.write_text(json.dumps(dataclasses.asdict(request)))
        command = [sys.executable, "-m", "experiments.baselines.vllm_process", str(asked), str(replied)]
        env = ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"vLLM took more than {timeout_s:.0f} s. Ask for fewer pairs or cells.") from error
        if done.returncode != 0:
            raise EngineError(f"vLLM's process failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")
        fields = json.loads(replied.read_text())
        return Reply(**fields | {"cells": [PeerCell(**cell) for cell in fields["cells"]]})


def measure(request: Request) -> Reply:
    import vllm
    from vllm import LLM, SamplingParams

    window = max(context + query for context, query in request.cells) + request.decode_tokens + 1
    options: dict[str, Any] = {"load_format": "dummy"} if request.dummy_weights else {}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        options["gpu_memory_utilization"] = round(min(0.9, (free - LEFT_FREE_BYTES) / total), 3)
    else:
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": int(CPU_KV_CACHE_GIB * 2**30)}
    llm = LLM(
        model=request.model,
        skip_tokenizer_init=True,
        dtype=request.dtype,
        max_model_len=window,
        enable_prefix_caching=True,
        disable_log_stats=True,
        **options,
    )
    chance = random.Random(0)

    def fresh(tokens: int) -> list[int]:
        return [chance.randrange(LEAST_ID, request.vocab) for _ in range(tokens)]

    def timed(ids: list[int], tokens: int) -> tuple[float, int]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, detokenize=False, ignore_eos=True)
        started = time.perf_counter()
        prompts: Any = [{"prompt_token_ids": ids}]
        (output,) = llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started, output.num_cached_tokens or 0

    cells = []
    for context, query in request.cells:
        cold_s, hit_s, cached = [], [], 0
        for round_ in range(1 + request.rounds):
            memory = fresh(context)
            llm.reset_prefix_cache()
            cold, _ = timed(memory + fresh(query), 1)
            hit, cached = timed(memory + fresh(query), 1)
            if round_:
                cold_s.append(cold)
                hit_s.append(hit)
        cells.append(PeerCell(context, query, cold_s, hit_s, cached))
    context, query = max(request.cells, key=lambda cell: (cell[0], -cell[1]))
    ids = fresh(context + query)
    rates = []
    for round_ in range(1 + max(3, request.rounds // 3)):
        one_s, _ = timed(ids, 1)
        many_s, _ = timed(ids, request.decode_tokens)
        if round_:
            rates.append((request.decode_tokens - 1) / (many_s - one_s))
    return Reply(vllm.__version__, cells, context + query, rates)


if __name__ == "__main__":
    asked = Request(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(dataclasses.asdict(measure(asked))))
