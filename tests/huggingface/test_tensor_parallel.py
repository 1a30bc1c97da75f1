"""Memories move between one process and two that share a model's KV heads, with Hugging Face and gloo on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache.dynamic_cache import layers_of
from kvmem.cache.fingerprint import ModelFingerprint
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.huggingface.config import HFConfig
from kvmem.engines.huggingface.tensor_parallel import HFRanksBackend, HFRanksConfig
from kvmem.errors import ConfigError
from tests.helpers.hf_ranks import NEW_TOKENS, RANDOM, answers, first_logits
from tests.helpers.tiny import loaded, memory_on, pairs

ROOT = Path(__file__).parents[2]
PAIRS = [list(pair) for pair in pairs(3, 900, seed=5)]
MERGE = "RopeShift"


def two_ranks(folder: Path, device: str) -> None:
    order = {"model": str(folder / "model"), "folder": str(folder), "pairs": PAIRS, "merge": MERGE}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.helpers.hf_ranks", json.dumps(order)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | hidden,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensor_parallel_memories_move_between_one_process_and_two(device: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs are here, and tensor parallel needs 2 of one host")
    model = loaded("tiny_wide")
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    alone = memory_on(HFBackend.open(HFConfig(str(tmp_path / "model"), device=device, dtype="float32")), merge=MERGE)
    alone.add([alone.extract(text) for text, _ in PAIRS])
    alone.dump(tmp_path / "of one")
    (tmp_path / "taken" / alone.config.memory_filename).mkdir(parents=True)
    items, at_one = alone.get_all(), answers(alone, PAIRS)
    whole = [[{"role": "system", "content": text}, {"role": "user", "content": query}] for text, query in PAIRS]
    direct = [alone.backend.generate(turns, None, NEW_TOKENS).token_ids for turns in whole]

    two_ranks(tmp_path, device)
    results = [json.loads((tmp_path / f"rank {rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    one = results[0]
    assert alone.backend.fingerprint.difference(ModelFingerprint(**one["fingerprint"])) is None
    assert one["heads"] == [1] * len(PAIRS) and alone.backend.fingerprint.kv_heads == 2
    assert one["bytes"] == [item.metadata.kv_bytes for item in items]
    assert "nowhere" in one["not everywhere"]
    assert one["refused"] == "StorageError" and "this one is divided" in one["not planned for"]

    assert "backend=hf_ranks computes all layers of a build in one step" in one["not paused"]
    assert len(one["prefill_s"]) == 2 and min(one["prefill_s"]) > 0

    random = KVCacheMemory(
        KVCacheMemoryConfig(extractor_llm={"backend": "huggingface", "config": RANDOM | {"device": device}})
    )
    fingerprint, logits = one["random"]
    assert random.backend.fingerprint.difference(ModelFingerprint(**fingerprint)) is None
    assert first_logits(random) == pytest.approx(logits, abs=1e-5) and max(logits) - min(logits) > 0.01

    alone.load(tmp_path / "of two")
    assert [item.kv_cache_id for item in alone.get_all()] == one["ids"]
    for built, read in zip(items, alone.get_all(), strict=True):
        torch.testing.assert_close(layers_of(read.kv_cache), layers_of(built.kv_cache), rtol=1e-4, atol=1e-4)
    assert at_one[: len(PAIRS)] == direct and len(set(at_one)) == len(at_one)
    for others in (one["built"], one["injected"], answers(alone, PAIRS)):
        assert [tuple(answer) for answer in others] == at_one


def test_tensor_parallel_is_refused_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="torchrun"):
        HFRanksBackend.open(HFRanksConfig("random:tiny_wide"))
