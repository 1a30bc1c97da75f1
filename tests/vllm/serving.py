"""A real vLLM server for the tests, and a proxy that omits a field of its answers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.engines.vllm.server.backend import VLLMServerBackend
from tests.helpers.tiny import pairs

Connect = Callable[..., KVCacheMemory]

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m"
KEY_VARIABLE, KEY = "KVMEM_TEST_KEY", "a key of the tests"
WINDOW = 1536
START_S = 280
CACHE_BYTES = 80 << 20
CACHE_TOKENS = CACHE_BYTES // 46_080
"""Small, so that requests soon evict; a token of this model takes 46,080 bytes in fp32."""
FLAGS = (
    "--host",
    "127.0.0.1",
    "--max-model-len",
    str(WINDOW),
    "--kv-cache-memory-bytes",
    str(CACHE_BYTES),
    "--distributed-executor-backend",
    "uni",
)
ENVIRONMENT = {"VLLM_API_KEY": KEY, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The latter, with the executor `uni`, saves the server a process for its only worker, and 15 s at its start."""

LEARN_AFTER = 6
LEARNING = ("--learn", "auto", "--learn-after", str(LEARN_AFTER))
"""The launcher's options of a server that learns, and injects what it finds. No other test asks that often."""

NEW_TOKENS = 12
BLOCK_TOKENS = 128
QUERY = "Which rule is the first?"
TEXTS = [text[:700] for text, _ in pairs(6, 1400, seed=11)]


def on_server(backend: VLLMServerBackend, **fields: object) -> KVCacheMemory:
    """An empty memory on a backend that is already connected."""
    return KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "vllm_server", "config": {}}, **fields), backend)


def as_turns(text: str, query: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}, {"role": "user", "content": query}]


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(store: Path, log: Path, *options: str) -> Iterator[str]:
    """Starts a server by the launcher, with the launcher's `options`. Gives its base URL, and ends its process group
    with the block.

    Raises AssertionError with the server's log if it does not start.
    """
    with running_process(store, log, *options) as (url, _):
        yield url


@contextmanager
def running_process(store: Path, log: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """As `running`; gives its process too."""
    port = free_port()
    command = [sys.executable, "-m", "kvmem.engines.vllm.server.serve", "--model", MODEL, "--store", str(store)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command, *options, "--", *FLAGS, "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        )
    try:
        deadline = time.monotonic() + START_S
        while not _healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        with suppress(ProcessLookupError):  # the block has ended it
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def without_counts(base_url: str, zeros_only: bool) -> Iterator[str]:
    """A proxy of the server at `base_url` that omits `prompt_tokens_details` from whole answers: always, as a server
    without the flag does, or where the count is zero, as vLLM 0.24 does."""
    host = base_url.removeprefix("http://").removesuffix("/v1")

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server = http.client.HTTPConnection(host)
            headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if self.headers[name]}
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            completion = json.loads(answer.read())
            usage = completion.get("usage", {})
            details = usage.get("prompt_tokens_details")
            if details and not (zeros_only and details["cached_tokens"]):
                usage["prompt_tokens_details"] = None
            sent = json.dumps(completion).encode()
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}/v1"
        proxy.shutdown()
