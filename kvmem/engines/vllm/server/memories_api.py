"""`/v1/memories` on vLLM's own server: memories that are created, listed, pinned and deleted by any HTTP client.

vLLM loads `MemoriesAPI` by its option --middleware. The routes are added to vLLM's app, so its API keys guard them.
"""

from __future__ import annotations

import asyncio
import os
import re
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kvmem.cache import MemoryTokens, Source, TextualMemoryItem
from kvmem.engines.vllm.connector import (
    ADMIN_KEY,
    ADMIN_VARIABLE,
    EXPLAIN,
    FOLDER,
    ITEM,
    LOAD,
    NAMED,
    PIN,
    PIN_TTL_S,
    PREFETCH,
    REPORT,
    SAVE,
    UNPIN,
    Report,
    join_parts,
)
from kvmem.engines.vllm.file_injection import BUILD_TOKENS, new_manifest
from kvmem.engines.vllm.memory_files import salt_within
from kvmem.engines.vllm.server.card import ServerCard
from kvmem.engines.vllm.server.catalogue import Catalogue, StoredMemory, store_fault
from kvmem.errors import ArgumentError, DuplicateMemoryError, EngineError, PromptError, StorageError, UnknownMemoryError
from kvmem.models import loading
from kvmem.prompt import PromptTemplate

MIDDLEWARE = f"{__name__}.MemoriesAPI"
NAMESPACE = r"^([A-Za-z0-9][A-Za-z0-9._@-]{0,99})?$"
"""What KVCacheMemoryConfig takes as a namespace."""
STATUS: dict[type[Exception], HTTPStatus] = {
    PromptError: HTTPStatus.BAD_REQUEST,
    ArgumentError: HTTPStatus.BAD_REQUEST,
    UnknownMemoryError: HTTPStatus.NOT_FOUND,
    DuplicateMemoryError: HTTPStatus.CONFLICT,
    StorageError: HTTPStatus.INSUFFICIENT_STORAGE,
    EngineError: HTTPStatus.CONFLICT,
}


class NewMemory(BaseModel):
    """The body of POST /v1/memories. Give `text`, or earlier chat turns as `messages`."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    messages: list[dict[str, str]] | None = None
    name: str = Field(default="", max_length=200)
    """With the name of an existing memory, the new one takes its place."""
    namespace: str = Field(default="", pattern=NAMESPACE)


class Pin(BaseModel):
    """The body of POST /v1/memories/ID/pin."""

    model_config = ConfigDict(extra="forbid")

    ttl_s: float = Field(default=3600.0, gt=0)
    """After so many seconds the pin ends by itself."""
    namespace: str = Field(default="", pattern=NAMESPACE)


class Prompt(BaseModel):
    """The body of POST /v1/memories/explain: a prompt as messages of a chat, as text, or as token ids."""

    model_config = ConfigDict(extra="forbid")

    messages: list[dict[str, str]] | None = None
    prompt: str | list[int] | None = None
    namespace: str = Field(default="", pattern=NAMESPACE)


class Memories:
    """The memories of one server. `app` is vLLM's FastAPI app, whose engine is there when a request comes."""

    def __init__(self, app: Any) -> None:
        self.engine = app.state.engine_client
        transfer = self.engine.vllm_config.kv_transfer_config
        self.folder = Path(transfer.kv_connector_extra_config[FOLDER])
        self.card = ServerCard.read(self.folder)
        self.window: int = self.engine.vllm_config.model_config.max_model_len
        self.tokenizer = loading.load_tokenizer(self.card.model)
        self.template = PromptTemplate(self.tokenizer, "chat" if self.tokenizer.chat_template else "plain")
        self.catalogue = Catalogue(self.folder)
        self.lock = asyncio.Lock()

    async def create(self, wanted: NewMemory) -> dict[str, Any]:
        """Prefills a text into a new file. If its namespace has the same tokens under the same name, that one stays."""
        tokens = await asyncio.to_thread(self._tokens_of, wanted)
        if len(tokens.token_ids) + BUILD_TOKENS > self.window:
            raise PromptError(
                f"The memory has {len(tokens.token_ids)} tokens, and the server's window is {self.window}. Shorten it, "
                "or start the server with a larger --max-model-len."
            )
        async with self.lock:
            existing = await asyncio.to_thread(self.catalogue.memories, wanted.namespace)
            same_name = [
                memory
                for memory in existing
                if memory.is_persistent and not memory.is_learned and memory.name == wanted.name
            ]
            for memory in same_name:
                if memory.head.token_ids == tokens.token_ids and memory.head.is_plain:
                    return self._shown(memory)
            created = await self._build(wanted, tokens)
            for memory in same_name if wanted.name else ():
                await asyncio.to_thread(self.catalogue.delete, memory)
        return self._shown(created)

    async def all(self, namespace: str) -> dict[str, Any]:
        """All memories of a namespace, with the pins that the engine has."""
        memories = await asyncio.to_thread(self.catalogue.memories, namespace)
        pins = (await self._ordered({PREFETCH: []}, namespace)).pins
        return {"object": "list", "data": [self._shown(memory, pins) for memory in memories]}

    async def one(self, namespace: str, wanted: str) -> dict[str, Any]:
        """A memory with its source."""
        memory = await asyncio.to_thread(self.catalogue.find, namespace, wanted)
        pins = (await self._ordered({PREFETCH: []}, namespace)).pins
        shown = self._shown(memory, pins)
        if memory.is_learned:  # of traffic, which is tokens
            ids = list(memory.head.token_ids)
            return shown | {"source": await asyncio.to_thread(lambda: self.tokenizer.decode(ids))}
        return shown | {"source": memory.source}

    async def delete(self, namespace: str, wanted: str) -> dict[str, Any]:
        """Deletes a memory's file and its pin."""
        memory = await asyncio.to_thread(self.catalogue.find, namespace, wanted)
        await asyncio.to_thread(self.catalogue.delete, memory)
        await self._ordered({PREFETCH: [], UNPIN: [memory.file]}, namespace)
        return {"id": memory.id, "object": "memory", "deleted": True}

    async def pin(self, wanted: str, pin: Pin) -> dict[str, Any]:
        """Keeps a memory's whole blocks in the engine's prefix cache."""
        memory = await asyncio.to_thread(self.catalogue.find, pin.namespace, wanted)
        order = {LOAD: memory.file, PIN: memory.file, PIN_TTL_S: pin.ttl_s}
        report = await self._ordered(order, pin.namespace, memory.head.token_ids)
        if report.load_error or report.pin_error:
            raise EngineError(f"{memory.id} is not pinned: {report.load_error or report.pin_error}")
        return {**self._shown(memory, report.pins), "pinned_tokens": report.pinned_tokens}

    async def unpin(self, namespace: str, wanted: str) -> dict[str, Any]:
        """Lets the engine evict a memory's blocks again."""
        memory = await asyncio.to_thread(self.catalogue.find, namespace, wanted)
        report = await self._ordered({PREFETCH: [], UNPIN: [memory.file]}, namespace)
        return self._shown(memory, report.pins)

    async def explain(self, asked: Prompt) -> dict[str, Any]:
        """Whether a prompt would hit, by the engine's own index."""
        ids = await asyncio.to_thread(self._prompt_ids, asked)
        told = (await self._ordered({EXPLAIN: ids}, asked.namespace)).explained
        answer = {"prompt_tokens": len(ids), "hit": False, "memory": None, "tokens": 0, "reason": told["reason"]}
        answer["learning"] = told["learning"]
        if not told["name"]:
            return answer
        memories = await asyncio.to_thread(self.catalogue.memories, asked.namespace)
        shown = [self._shown(memory) for memory in memories if memory.file == told["name"]]
        answer |= {"memory": shown[0] if shown else None, "tokens": told["tokens"]}
        if told["mode"] == NAMED:
            return answer | {"reason": "The server injects only what a request names. Start it with --inject auto."}
        return answer | {"hit": True, "in_host_memory": told["in_host_memory"]}

    def fault(self) -> str:
        """Why the store could not take a memory as long as the server's window; "" if it could."""
        return store_fault(self.folder, self.card.fingerprint.kv_bytes(self.window))

    def _tokens_of(self, wanted: NewMemory) -> MemoryTokens:
        if (wanted.text is None) == (wanted.messages is None):
            raise PromptError("A memory is made of `text` or of `messages`. Give one of them.")
        source: Source = wanted.text if wanted.text is not None else tuple(wanted.messages or ())
        return self.template.memory_tokens(source)

    def _prompt_ids(self, asked: Prompt) -> list[int]:
        if (asked.messages is None) == (asked.prompt is None):
            raise PromptError("A prompt is given as `messages` or as `prompt`. Give one of them.")
        if asked.messages is not None:
            return list(self.template.bare(asked.messages).ids)
        if isinstance(asked.prompt, list):
            return asked.prompt
        ids: list[int] = self.tokenizer(asked.prompt).input_ids
        return ids

    async def _build(self, wanted: NewMemory, tokens: MemoryTokens) -> StoredMemory:
        fault = store_fault(self.folder, self.card.fingerprint.kv_bytes(len(tokens.token_ids)))
        if fault:
            raise StorageError(fault)
        named = TextualMemoryItem(id=wanted.name, memory="") if wanted.name else None
        manifest = new_manifest(tokens, self.card.fingerprint, named, wanted.namespace)
        order = {SAVE: True, ITEM: manifest.model_dump_json()}
        report = await self._ordered(order, wanted.namespace, tokens.token_ids, BUILD_TOKENS, apart=True)
        if not report.saved:
            raise StorageError(f"The memory was not saved: {report.save_error}")
        if self.card.ranks > 1:
            config, ranks = self.card.pretrained_config(), self.card.ranks
            await asyncio.to_thread(join_parts, self.folder, report.saved, self.card.fingerprint, config, ranks)
        return await asyncio.to_thread(self.catalogue.find, wanted.namespace, manifest.kv_cache_id)

    async def _ordered(
        self,
        order: dict[str, Any],
        namespace: str,
        token_ids: tuple[int, ...] = (0,),
        new_tokens: int = 1,
        apart: bool = False,
    ) -> Report:
        """Sends the engine a request that carries an order. apart: it shares no blocks with others."""
        from vllm import SamplingParams

        transfer = {**order, ADMIN_KEY: os.environ.get(ADMIN_VARIABLE, "")}
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, extra_args={"kv_transfer_params": transfer}
        )
        prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
        salt = salt_within(namespace, uuid.uuid4().hex) if apart or token_ids == (0,) else namespace
        if salt:
            prompt["cache_salt"] = salt
        answer: dict[str, Any] | None = None
        async for output in self.engine.generate(prompt, sampling, f"kvmem-{uuid.uuid4().hex}"):
            answer = output.kv_transfer_params or answer
        if not answer or REPORT not in answer:
            raise EngineError("The engine ended the request without a report. Its log says why.")
        return Report.parse(answer[REPORT])

    def _shown(self, memory: StoredMemory, pins: dict[str, float | None] | None = None) -> dict[str, Any]:
        return {
            "id": memory.id,
            "object": "memory",
            "name": memory.name,
            "namespace": memory.head.entry.metadata.namespace,
            "tokens": memory.tokens,
            "bytes": memory.head.kv_bytes,
            "created_at": int(memory.created_at.timestamp()),
            "persistent": memory.is_persistent,
            "learned": memory.is_learned,
            "file": memory.file,
            "pinned_s": (pins or {}).get(memory.file),
        }


class MemoriesAPI:
    """Middleware that adds the routes to vLLM's app when the app starts. Requests pass it unchanged."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            attach(scope["app"])
        await self.app(scope, receive, send)


def attach(app: Any) -> None:
    """Adds the routes to a FastAPI app."""
    made: list[Memories] = []

    def memories() -> Memories:
        if not made:
            made.append(Memories(app))
        return made[0]

    async def create(body: NewMemory) -> dict[str, Any]:
        with named_errors():
            return await memories().create(body)

    async def list_all(namespace: str = "") -> dict[str, Any]:
        with named_errors():
            check_namespace(namespace)
            return await memories().all(namespace)

    async def get(memory: str, namespace: str = "") -> dict[str, Any]:
        with named_errors():
            check_namespace(namespace)
            return await memories().one(namespace, memory)

    async def delete(memory: str, namespace: str = "") -> dict[str, Any]:
        with named_errors():
            check_namespace(namespace)
            return await memories().delete(namespace, memory)

    async def pin(memory: str, body: Pin) -> dict[str, Any]:
        with named_errors():
            return await memories().pin(memory, body)

    async def unpin(memory: str, namespace: str = "") -> dict[str, Any]:
        with named_errors():
            check_namespace(namespace)
            return await memories().unpin(namespace, memory)

    async def explain(body: Prompt) -> dict[str, Any]:
        with named_errors():
            return await memories().explain(body)

    def health() -> dict[str, str]:
        with named_errors(HTTPStatus.SERVICE_UNAVAILABLE):
            fault = memories().fault()
            if fault:
                raise StorageError(fault)
        return {"status": "ok"}

    for path, method, handler in (
        ("/v1/memories", "POST", create),
        ("/v1/memories", "GET", list_all),
        ("/v1/memories/explain", "POST", explain),
        ("/v1/memories/{memory}", "GET", get),
        ("/v1/memories/{memory}", "DELETE", delete),
        ("/v1/memories/{memory}/pin", "POST", pin),
        ("/v1/memories/{memory}/pin", "DELETE", unpin),
        ("/health/memories", "GET", health),
    ):
        app.add_api_route(path, handler, methods=[method], tags=["memories"])


def check_namespace(namespace: str) -> None:
    """Raises ArgumentError for a text that KVCacheMemoryConfig does not take as a namespace."""
    if re.fullmatch(NAMESPACE, namespace) is None:
        raise ArgumentError(
            f"The namespace is {namespace!r}. Give letters, digits, '.', '_', '-' or '@', at most 100, and a letter or "
            "a digit first."
        )


@contextmanager
def named_errors(storage: HTTPStatus = HTTPStatus.INSUFFICIENT_STORAGE) -> Iterator[None]:
    """Turns kvmem's errors into HTTP's. storage: the status of a StorageError."""
    from fastapi import HTTPException

    try:
        yield
    except tuple(STATUS) as error:
        status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
        if isinstance(error, StorageError):
            status = storage
        raise HTTPException(status.value, detail=str(error)) from error
