"""Measures vLLM without kvmem, in a process of its own: cold TTFT, prefix-hit TTFT and the decoding rate.

The process reads a `Request` as JSON from the file named by its first argument, and writes a `Reply` to the file named
by its second. It uses vLLM's public API only. Times are those of `LLM.generate`, from token ids to the generated token
id on the host. Prompts are random ids.
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

RESERVE_BYTES = 2 << 30
"""Free GPU memory that is left to the engine beyond its configured share."""
LOWEST_ID = 1000
"""The lowest token id of prompts. Lower ids may be special tokens."""


@dataclass(frozen=True)
class Request:
    """What to measure."""

    model: str
    """A folder or hub name."""
    dummy_weights: bool
    """Whether the folder holds only a config, so that vLLM has to create dummy weights."""
    dtype: str
    vocab: int
    """The size of the vocabulary."""
    cells: list[tuple[int, int]]
    """(context, query) token counts."""
    rounds: int
    """The number of repetitions after a warm-up round."""
    decode_tokens: int
    """The number of greedy tokens that measure the decoding rate, after the longest context."""


@dataclass(frozen=True)
class PeerCell:
    """vLLM's times in one cell."""

    context_tokens: int
    query_tokens: int
    cold_all_s: list[float]
    hit_all_s: list[float]
    cached_tokens: int
    """The number of tokens of a hit that came from the engine's prefix cache."""


@dataclass(frozen=True)
class Reply:
    """The measurements of the process."""

    version: str
    """vLLM's version."""
    cells: list[PeerCell]
    decode_context_tokens: int
    decode_tokens_per_s_all: list[float]

    def cell(self, context_tokens: int, query_tokens: int) -> PeerCell | None:
        """The cell with these token counts, or None."""
        counts = (context_tokens, query_tokens)
        return next((cell for cell in self.cells if (cell.context_tokens, cell.query_tokens) == counts), None)


def measure_in_process(request: Request, timeout_s: float) -> Reply:
    """Runs `measure` in a new process. Raises EngineError if the process fails, or takes longer than `timeout_s`."""
    with tempfile.TemporaryDirectory() as folder:
        request_path, reply_path = Path(folder) / "request.json", Path(folder) / "reply.json"
        request_path.write_text(json.dumps(dataclasses.asdict(request)))
        command = [sys.executable, "-m", "experiments.baselines.vllm_process", str(request_path), str(reply_path)]
        env = ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"vLLM took more than {timeout_s:.0f} s. Measure fewer pairs or cells, or set scenario.vllm_timeout_s."
            ) from error
        if done.returncode != 0:
            raise EngineError(f"vLLM's process failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")
        fields = json.loads(reply_path.read_text())
        return Reply(**fields | {"cells": [PeerCell(**cell) for cell in fields["cells"]]})


def measure(request: Request) -> Reply:
    """Measures vLLM in the current process."""
    import vllm
    from vllm import LLM, SamplingParams

    window = max(context + query for context, query in request.cells) + request.decode_tokens + 1
    options: dict[str, Any] = {"load_format": "dummy"} if request.dummy_weights else {}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        options["gpu_memory_utilization"] = round(min(0.9, (free - RESERVE_BYTES) / total), 3)
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
    rng = random.Random(0)

    def random_ids(tokens: int) -> list[int]:
        return [rng.randrange(LOWEST_ID, request.vocab) for _ in range(tokens)]

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
            memory = random_ids(context)
            llm.reset_prefix_cache()
            cold, _ = timed(memory + random_ids(query), 1)
            hit, cached = timed(memory + random_ids(query), 1)
            if round_:
                cold_s.append(cold)
                hit_s.append(hit)
        cells.append(PeerCell(context, query, cold_s, hit_s, cached))
    context, query = max(request.cells, key=lambda cell: (cell[0], -cell[1]))
    ids = random_ids(context + query)
    rates = []
    for round_ in range(1 + max(3, request.rounds // 3)):
        one_s, _ = timed(ids, 1)
        many_s, _ = timed(ids, request.decode_tokens)
        if round_:
            rates.append((request.decode_tokens - 1) / (many_s - one_s))
    return Reply(vllm.__version__, cells, context + query, rates)


if __name__ == "__main__":
    request_read = Request(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(dataclasses.asdict(measure(request_read))))
