"""Starts vLLM's own OpenAI server, set up for `backend: vllm_server`.

    python -m kvmem.engines.vllm.server.serve --model smollm2-135m --store memories -- --port 8000 --max-model-len 4096

With --store the server runs our KV connector: memories are files in that folder, which clients must see too. Without,
memories are prefixes in the server's own cache. What stands behind `--` goes to `vllm serve` as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pydantic
import torch

from kvmem.cache import fingerprint_of
from kvmem.engines.vllm import launch
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.engines.vllm.launch import described, dtype_of
from kvmem.engines.vllm.server.card import ServerCard
from kvmem.errors import KVMemError, config_error
from kvmem.models import loading

CPU_FLAGS = ("--enforce-eager", "--kv-cache-memory-bytes", str(int(launch.CPU_KV_CACHE_GIB * 2**30)))
"""Where there is no GPU: compiling takes minutes there, and vLLM's own choice of memory is half the machine's."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Becomes vLLM's server; returns only by raising."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    options = _parser().parse_args(given[:at])
    try:
        launch.check_installed()
        command = serve_command(options, given[at + 1 :])
    except pydantic.ValidationError as error:
        raise SystemExit(str(config_error("vllm_serve", error, ()))) from error
    except KVMemError as error:
        raise SystemExit(f"vllm_serve: {error}") from error
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options.tensor_parallel_size > 1 and not torch.cuda.is_available():
        cores = launch.cores_by_rank(options.tensor_parallel_size)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    # What `vllm serve` runs, by its module: the script does not look for kvmem in the current folder, and in the CPU
    # build it fails, for the package is of another name there.
    # A further node of a server has no API, which only the script itself knows (--headless).
    script, server = ["vllm.entrypoints.cli.main", "serve"], ["vllm.entrypoints.openai.api_server"]
    os.execv(sys.executable, [sys.executable, "-m", *(script if "--headless" in command else server), *command])


def serve_command(given: argparse.Namespace, for_vllm: Sequence[str]) -> list[str]:
    """The server's arguments. The model's folder is made where it needs one, and the store's card is written."""
    config = VLLMConfig(model_name_or_path=given.model, dtype=given.dtype, seed=given.seed, random_weights="saved")
    loaded = described(config, dtype_of(config))
    folder = loading.engine_folder(given.model, loaded)
    command = ["--model", folder, "--served-model-name", given.served_model_name or given.model]
    command += ["--dtype", str(loaded.model.dtype).removeprefix("torch.")]
    command += ["--tensor-parallel-size", str(given.tensor_parallel_size), "--enable-prompt-tokens-details"]
    if not torch.cuda.is_available():
        command += CPU_FLAGS
    if given.store is not None:
        store = given.store.resolve()
        ours = fingerprint_of(loaded.model, loaded.tokenizer, loaded.origin)
        card = ServerCard(
            model=folder, fingerprint=ours, config=loaded.model.config.to_dict(), ranks=given.tensor_parallel_size
        )
        card.write(store)
        # No asynchronous scheduling: see vllm_start.
        command += ["--no-async-scheduling", "--kv-transfer-config"]
        command.append(json.dumps(launch.transfer_config(store, ours)))
    return [*command, *for_vllm]  # last, for the last of two values counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvmem.engines.vllm.server.serve",
        usage="%(prog)s [options] [-- FLAGS OF vllm serve]",
        description="Starts vLLM's OpenAI server for the backend vllm_server.",
    )
    parser.add_argument("--model", default=loading.PACKAGED, help="hub name, folder, smollm2-135m or random:<shape>")
    parser.add_argument("--served-model-name", help="what clients call it; as --model if not given")
    parser.add_argument("--store", type=Path, help="folder of memory files, shared with clients; made if it is missing")
    parser.add_argument("--dtype", default="auto", help="auto: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    return parser


if __name__ == "__main__":
    main()
