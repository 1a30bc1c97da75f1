"""Memories move between engines of different tensor-parallel sizes: bits and answers stay equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny import loaded, pairs
from tests.vllm.conftest import skip_without_vllm
from tests.vllm.ranks import BUILT, INJECTED

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("engine")

QUESTIONS = pairs(2, 1200, seed=11)
TURNS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "I have read it."}] for text, _ in QUESTIONS
]
Step = tuple[str, Path]


def engine(config: dict[str, Any], ranks: int, steps: list[Step], log: Path) -> subprocess.Popen[bytes]:
    order = {
        "config": {**config, "tensor_parallel_size": ranks},
        "steps": [(step, str(folder)) for step, folder in steps],
        "turns": TURNS,
        "queries": [query for _, query in QUESTIONS],
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.vllm.ranks", json.dumps(order)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(processes: dict[Path, subprocess.Popen[bytes]]) -> None:
    """Waits for all processes. Each waits for what the others build, so the first that fails ends all."""
    try:
        while any(process.poll() is None for process in processes.values()):
            assert not any(process.returncode for process in processes.values()), last_lines(processes)
            time.sleep(0.2)
        assert not any(process.returncode for process in processes.values()), last_lines(processes)
    finally:
        for process in processes.values():
            process.kill()


def last_lines(processes: dict[Path, subprocess.Popen[bytes]]) -> str:
    ended = {log.name: process.returncode for log, process in processes.items()}
    return "\n".join([str(ended), *(f"{log.name}: {log.read_text()[-3000:]}" for log in processes)])


def results_of(path: Path) -> list[dict[str, Any]]:
    answers = json.loads(path.read_text())
    for answer in answers:
        assert answer["injected"] == [0, answer["memory_tokens"]]
        assert answer["same_bits"]
    return answers


def moved(tmp_path: Path, config: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Results of one rank and of two ranks with their own memories, and of each with the memories of the other."""
    of_one, of_two = tmp_path / "of one", tmp_path / "of two"
    logs = {ranks: tmp_path / f"{ranks} ranks.log" for ranks in (1, 2)}
    finish(
        {
            logs[1]: engine(config, 1, [("build", of_one), ("inject", of_two)], logs[1]),
            logs[2]: engine(config, 2, [("build", of_two), ("inject", of_one)], logs[2]),
        }
    )
    return [results_of(folder / name) for name in (BUILT, INJECTED) for folder in (of_one, of_two)]


def wide_model(tmp_path: Path) -> dict[str, Any]:
    """A tiny model in fp32 whose heads can be divided among two ranks."""
    model = loaded("tiny_wide")
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_gib": 0.05,
    }


def assert_same_tokens(results: list[list[dict[str, Any]]]) -> None:
    for answers in zip(*results, strict=True):
        assert {answer["grade"] for answer in answers} == {"tokens"}
        assert len({tuple(answer["tokens"]) for answer in answers}) == 1
    assert len({tuple(answer["tokens"]) for answer in results[0]}) == len(QUESTIONS)


def test_tensor_parallel_memories_move_between_one_rank_and_two(tmp_path: Path) -> None:
    skip_without_vllm()
    assert_same_tokens(moved(tmp_path, wide_model(tmp_path)))


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_tensor_parallel_on_gpus_moves_between_one_rank_and_two(tmp_path: Path) -> None:
    """fp32, with vLLM's Triton kernel."""
    skip_without_two_gpus()
    on_gpus = {"gpu_memory_utilization": 0.3, "kv_cache_gib": 1.0, "enforce_eager": True}
    assert_same_tokens(moved(tmp_path, wide_model(tmp_path) | on_gpus))


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_tensor_parallel_on_gpus_keeps_every_bit_in_bf16(tmp_path: Path) -> None:
    """FlashAttention, heads of 128. Tokens are not compared: random weights tie in bf16."""
    skip_without_two_gpus()
    config = {
        "model_name_or_path": "random:qwen3-0.6b",
        "random_weights": "saved",
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "kv_cache_gib": 4.0,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
    }
    moved(tmp_path, config)


def skip_without_two_gpus() -> None:
    skip_without_vllm()
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs found; tensor parallel needs 2 of one host")
