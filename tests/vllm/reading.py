"""A worker's host memory without an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.connector.file_reads import Read
from kvmem.engines.vllm.connector.held_files import HeldFiles, reader_for
from kvmem.engines.vllm.connector.host_memory import HostMemory
from kvmem.engines.vllm.connector.protocol import file_state
from kvmem.storage import read_head
from tests.helpers.tiny import CPU


def held_by(engine: HFBackend, folder: Path, rank: int = 0, ranks: int = 1, pages: int = 4) -> HeldFiles:
    memory = HostMemory(pages, pinned=False)
    return HeldFiles(folder, engine.fingerprint, engine.model_config, rank, ranks, memory, reader_for(memory, None))


def read_by(files: HeldFiles, path: Path) -> str:
    """Reads the file as the scheduler orders it. Returns why that failed; "" if it did not."""
    head = read_head(path)
    files.start(Read(file_state(path), head.checksum, head.kv_bytes))
    files.reads.wait(60.0)
    (done,) = files.reads.take_done()
    return done.error


def layers_held(files: HeldFiles, path: Path, layers: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Each (2, tokens, heads, head_dim)."""
    return [files.held[file_state(path)].layer(layer, dtype, CPU) for layer in range(layers)]
