"""Modules are imported without vLLM and openai: a client needs no vLLM, and other engines need neither."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "kvmem.engines.vllm",
    "kvmem.engines.vllm.config",
    "kvmem.engines.vllm.server",
    "kvmem.engines.vllm.connector",
    "experiments.baselines.vllm_process",
    "experiments.execution.command",
)
IMPORT_WITHOUT = """
import importlib, sys
for name in ("vllm", "openai"):
    sys.modules[name] = None  # importing it raises ImportError
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def test_modules_are_imported_without_vllm_and_openai() -> None:
    command = [sys.executable, "-c", IMPORT_WITHOUT, *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
