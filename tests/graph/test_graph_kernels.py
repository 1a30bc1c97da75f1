"""The Triton kernels: on a GPU, and on a CPU in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from kvmem.errors import ConfigError
from tests.graph.conftest import stored
from tests.graph.test_graph_engine import QUERY, TEXTS, same_answer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_agree_with_torch(device):
    """In a separate process, because the interpreter is chosen when Triton is imported."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton")
    env = os.environ | {"TRITON_INTERPRET": "1"} if device == "cpu" else os.environ
    command = [sys.executable, "-m", "tests.graph.kernels_beside_torch", device]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


def test_the_fused_kernels_are_refused_where_they_do_not_run(open_engine, setting):
    if setting.device != "cpu":
        pytest.skip("they run on a GPU")
    with pytest.raises(ConfigError, match=r"fused=true does not run here: it needs an NVIDIA GPU\. Use fused=null"):
        open_engine(fused=True)


def test_with_and_without_the_fused_kernels(open_engine, eager, setting):
    """On a GPU with and without them; every other test there uses the fused kernels."""
    for fused in (False, None):
        fast = open_engine(fused=fused)
        assert fast.engine.fused == (fused is None and setting.device != "cpu")
        memory, item = stored(fast, TEXTS[0])
        assert same_answer(fast, memory, item, eager, QUERY) < setting.tolerance
