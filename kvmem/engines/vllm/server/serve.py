"""Starts vLLM's own OpenAI server, set up for `backend: vllm_server`.

    python -m kvmem.engines.vllm.server.serve --model smollm2-135m --store memories -- --port 8000 --max-model-len 4096

With --store the server runs kvmem's KV connector: memories are files in that folder, which clients must reach too.
Without it, memories are prefixes in the server's own cache. Arguments after `--` are passed to `vllm serve` unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pydantic
import torch

from kvmem.engines.vllm import launch
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.engines.vllm.connector import ADMIN_VARIABLE, ANYONE, AUTO, NAMED, NOBODY, STORE, LearnConfig, make_save_key
from kvmem.engines.vllm.launch import dtype_of, load_description
from kvmem.engines.vllm.server import memories_api
from kvmem.engines.vllm.server.card import ServerCard
from kvmem.errors import ConfigError, KVMemError, config_error
from kvmem.models import loading

CPU_FLAGS = ("--enforce-eager", "--kv-cache-memory-bytes", str(int(launch.CPU_KV_CACHE_GIB * 2**30)))
"""Without a GPU: compiling takes minutes there, and by default vLLM takes half of the machine's memory."""


ORPHANS_AFTER_S = 86_400.0
OFF = "off"
WINDOW_FLAG = "--max-model-len"


def main(arguments: Sequence[str] | None = None) -> None:
    """Replaces this process by vLLM's server. Raises SystemExit, saying why, if it can't be started."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, for_vllm = options_of(given)
    try:
        launch.check_installed()
        command = serve_command(options, for_vllm)
    except pydantic.ValidationError as error:
        raise SystemExit(str(config_error("vllm_serve", error, ()))) from error
    except KVMemError as error:
        raise SystemExit(f"vllm_serve: {error}") from error
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ[ADMIN_VARIABLE] = uuid.uuid4().hex
    if options.tensor_parallel_size > 1 and not torch.cuda.is_available():
        cores = launch.cores_by_rank(options.tensor_parallel_size)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    # The module that `vllm serve` runs: the script does not look for kvmem in the current folder, and it fails in the
    # CPU build, where the package has another name. Only the script supports --headless, for the further nodes of a
    # server, which have no API.
    script, server = ["vllm.entrypoints.cli.main", "serve"], ["vllm.entrypoints.openai.api_server"]
    os.execv(sys.executable, [sys.executable, "-m", *(script if "--headless" in command else server), *command])


def options_of(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, and vLLM's behind `--`. Raises SystemExit for an unknown option."""
    at = list(given).index("--") if "--" in given else len(given)
    return _parser().parse_args(given[:at]), list(given[at + 1 :])


def serve_command(given: argparse.Namespace, for_vllm: Sequence[str]) -> list[str]:
    """The server's arguments. Saves the model to a folder if it is in none, and writes the store's card."""
    learn = _learn(given)
    config = VLLMConfig(
        model_name_or_path=given.model,
        dtype=given.dtype,
        seed=given.seed,
        random_weights="saved",
        host_cache_gib=given.host_cache_gib,
        read_mib_s=given.read_mib_s,
        max_model_len=_window(for_vllm),
    )
    loaded = load_description(config, dtype_of(config), with_connector=given.store is not None)
    folder = loading.engine_folder(given.model, loaded)
    command = ["--model", folder, "--served-model-name", given.served_model_name or given.model]
    command += ["--dtype", str(loaded.model.dtype).removeprefix("torch.")]
    command += ["--tensor-parallel-size", str(given.tensor_parallel_size), "--enable-prompt-tokens-details"]
    if not torch.cuda.is_available():
        command += CPU_FLAGS
    if given.store is not None:
        store = given.store.resolve()
        fingerprint = launch.fingerprint_of_description(loaded)
        orphans_after_s = given.orphans_after or None
        card = ServerCard(
            model=folder,
            fingerprint=fingerprint,
            config=loaded.model.config.to_dict(),
            ranks=given.tensor_parallel_size,
            orphans_after_s=orphans_after_s,
        )
        card.write(store)
        make_save_key(store)
        command += ["--middleware", memories_api.MIDDLEWARE]
        if given.drain_s:
            command += ["--shutdown-timeout", str(given.drain_s)]
        # No asynchronous scheduling: see launch.start.
        command += ["--no-async-scheduling", "--kv-transfer-config"]
        connector = launch.transfer_config(
            store,
            fingerprint,
            given.saves,
            False,
            orphans_after_s,
            config.host_cache_gib,
            config.read_mib_s,
            given.inject or (AUTO if learn is not None else NAMED),
            learn,
        )
        command.append(json.dumps(connector))
    return [*command, *for_vllm]  # last, because the last of two values counts


def _learn(given: argparse.Namespace) -> dict[str, Any] | None:
    """The connector's settings for learning; None if it learns nothing. Raises ConfigError for options that disagree,
    and pydantic's ValidationError for a bad value."""
    if given.learn == OFF:
        return None
    if given.store is None:
        raise ConfigError("--learn auto keeps memories in a store. Give --store FOLDER.")
    if given.inject == NAMED:
        raise ConfigError("--learn auto makes memories that no request names. Leave --inject out.")
    return asdict(LearnConfig(budget_gib=given.learn_gib, after=given.learn_after))


def _window(for_vllm: Sequence[str]) -> int | None:
    """The number of tokens that vLLM's flag --max-model-len gives; None if it gives none."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument(WINDOW_FLAG)
    given = flags.parse_known_args(list(for_vllm))[0].max_model_len
    return int(given) if given is not None and given.isdecimal() else None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{text} is not a number of seconds")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvmem.engines.vllm.server.serve",
        usage="%(prog)s [options] [-- FLAGS OF vllm serve]",
        description="Starts vLLM's OpenAI server for the backend vllm_server.",
    )
    parser.add_argument("--model", default=loading.PACKAGED, help="hub name, folder, smollm2-135m or random:<shape>")
    parser.add_argument("--served-model-name", help="the name that clients use; default: --model")
    parser.add_argument(
        "--store", type=Path, help="folder of memory files, shared with clients; created if it is missing"
    )
    parser.add_argument(
        "--saves",
        choices=(STORE, ANYONE, NOBODY),
        default=STORE,
        help="who may save memories in the store: clients that can read it (the default), anyone with a key, or nobody",
    )
    parser.add_argument(
        "--orphans-after",
        type=_seconds,
        default=ORPHANS_AFTER_S,
        metavar="SECONDS",
        help="when the file of a client that gives no sign of life is deleted; default: a day; 0: never",
    )
    parser.add_argument(
        "--inject",
        choices=(AUTO, NAMED),
        help="auto: each request gets the longest memory of its namespace that its prompt begins with; "
        "named (the default without --learn): only a memory that it names",
    )
    parser.add_argument(
        "--learn",
        choices=(AUTO, OFF),
        default=OFF,
        help="auto: prefixes that come again in the traffic become memories by themselves; default: off",
    )
    parser.add_argument(
        "--learn-gib",
        type=float,
        default=LearnConfig.budget_gib,
        metavar="GIB",
        help="disk space for what was learned; default: 16",
    )
    parser.add_argument(
        "--learn-after",
        type=int,
        default=LearnConfig.after,
        metavar="TIMES",
        help="how often a prefix has to come before it may become a memory; default: 3",
    )
    parser.add_argument(
        "--host-cache-gib",
        type=float,
        metavar="GIB",
        help="host memory for memory files, all ranks together; default: 8 with a GPU (pinned), 1 without",
    )
    parser.add_argument(
        "--read-mib-s", type=float, metavar="MIB", help="how much each rank reads from memory files at the most"
    )
    parser.add_argument(
        "--drain-s",
        type=int,
        default=0,
        metavar="SECONDS",
        help="how long the server, told to stop, lets running requests end; default: 0, they are aborted",
    )
    parser.add_argument("--dtype", default="auto", help="auto: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights")
    return parser


if __name__ == "__main__":
    main()
