"""Memories move between engines of different tensor-parallel sizes: to the bit, and so do the answers behind them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import loaded, pairs
from tests.vllm.conftest import skip_without_vllm
from tests.vllm.ranks import BUILT

ROOT = Path(__file__).parents[2]
ASKED = pairs(2, 1200, seed=11)
TURNS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "I have read it."}] for text, _ in ASKED
]  # fmt: skip
Step = tuple[str, Path]


def engine(config: dict[str, Any], ranks: int, steps: list[Step]) -> subprocess.Popen[str]:
    order = {
        "config": {**config, "tensor_parallel_size": ranks},
        "steps": [(step, str(folder)) for step, folder in steps],
        "turns": TURNS,
        "queries": [query for _, query in ASKED],
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.vllm.ranks", json.dumps(order)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate()
    assert process.returncode == 0, said[-4000:]


def told(path: Path) -> list[dict[str, Any]]:
    answers = json.loads(path.read_text())
    for answer in answers:
        assert answer["injected"] == [0, answer["memory_tokens"]]
        assert answer["same_bits"]
    return answers


def test_tensor_parallel_memories_move_between_one_rank_and_two(tmp_path: Path) -> None:
    skip_without_vllm()
    model = loaded("tiny_wide")
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    config = {
        "model_name_or_path": str(tmp_path / "model"), "dtype": "float32", "max_model_len": 1024, "kv_cache_gib": 0.05,
    }  # fmt: skip
    of_one, of_two = tmp_path / "of one", tmp_path / "of two"
    processes = [  # at the same time: each waits for what the other builds
        engine(config, 1, [("build", of_one), ("inject", of_two)]),
        engine(config, 2, [("build", of_two), ("inject", of_one)]),
    ]
    try:
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()
    at_one, at_two = told(of_one / BUILT), told(of_two / BUILT)
    from_two, from_one = told(of_two / "injected.json"), told(of_one / "injected.json")
    for answers in zip(at_one, at_two, from_two, from_one, strict=True):
        assert {answer["grade"] for answer in answers} == {"tokens"}
        assert len({tuple(answer["tokens"]) for answer in answers}) == 1
    assert len({tuple(answer["tokens"]) for answer in at_one}) == len(ASKED)


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_tensor_parallel_on_gpus_two_ranks_to_one_and_back(tmp_path: Path) -> None:
    """bf16, heads of 128, random weights: near ties are within rounding, as experiments.equality grades them."""
    skip_without_vllm()
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs are here, and tensor parallel needs 2 of one host")
    config = {
        "model_name_or_path": "random:qwen3-0.6b", "random_weights": "saved", "dtype": "bfloat16",
        "max_model_len": 4096, "kv_cache_gib": 4.0, "enforce_eager": True,
    }  # fmt: skip
    of_one, of_two = tmp_path / "of one", tmp_path / "of two"
    finish(engine(config, 2, [("build", of_two)]))
    finish(engine(config, 1, [("inject", of_two), ("build", of_one)]))
    finish(engine(config, 2, [("inject", of_one)]))
    for folder in (of_one, of_two):
        for answer in told(folder / BUILT) + told(folder / "injected.json"):
            assert answer["grade"] in ("tokens", "near_tie")
