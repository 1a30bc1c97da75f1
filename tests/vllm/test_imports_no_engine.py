"""The package is imported without vLLM and openai: a client needs no vLLM, and a configuration needs neither."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import importlib, sys
for name in ("vllm", "openai"):
    sys.modules[name] = None  # an import of it fails
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize(
    "module",
    ["kvmem.engines.vllm", "kvmem.engines.vllm.config", "kvmem.engines.vllm.server", "kvmem.engines.vllm.connector"],
)
def test_the_package_is_imported_without_vllm_and_openai(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, module], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
