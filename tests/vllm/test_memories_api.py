"""/v1/memories on vLLM's own app: a client with nothing but HTTP makes memories that outlive it and the server."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from kvmem.engines.vllm.server.backend import VLLMServerBackend
from kvmem.engines.vllm.server.catalogue import store_fault
from tests.helpers.tiny import pairs
from tests.vllm.plain_client import chat, learn, metrics
from tests.vllm.serving import BLOCK_TOKENS, KEY, LEARNING, MODEL, QUERY, as_turns, on_server, running_process

pytestmark = pytest.mark.timeout(420)
TEXTS = [text[:700] for text, _ in pairs(4, 1400, seed=51)]
LONG = pairs(1, 1400, seed=53)[0][0]


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key=KEY, max_retries=0)


def create(http: httpx.Client, namespace: str = "", **body: object) -> dict:
    answer = http.post("/memories", json={"namespace": namespace, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def listed(http: httpx.Client, namespace: str = "") -> dict[str, dict]:
    return {memory["id"]: memory for memory in http.get("/memories", params={"namespace": namespace}).json()["data"]}


def explained(http: httpx.Client, text: str, namespace: str = "") -> dict:
    body = {"messages": as_turns(text, QUERY), "namespace": namespace}
    return http.post("/memories/explain", json=body).json()


def test_a_memory_from_its_creation_to_its_end(http: httpx.Client, client: OpenAI) -> None:
    text = TEXTS[0]
    cold, _, _ = chat(client, text, "elsewhere")
    assert explained(http, text, "api")["hit"] is False
    memory = create(http, "api", text=text, name="handbook")
    assert memory == create(http, "api", text=text, name="handbook"), "the same text under the same name is there"
    assert memory["persistent"] and memory["tokens"] > BLOCK_TOKENS
    told = explained(http, text, "api")
    assert (told["hit"], told["memory"]["id"], told["tokens"]) == (True, memory["id"], memory["tokens"])
    answer, cached, _ = chat(client, text, "api")
    assert (answer, cached) == (cold, memory["tokens"])
    assert explained(http, text, "api")["in_host_memory"] is True
    assert list(listed(http, "api")) == [memory["id"]]
    for wanted in (memory["id"], "handbook"):
        one = http.get(f"/memories/{wanted}", params={"namespace": "api"}).json()
        assert (one["id"], one["source"]) == (memory["id"], text)

    edited = create(http, "api", text=f"Never mind. {text}", name="handbook")  # takes the place of the first
    assert list(listed(http, "api")) == [edited["id"]]
    assert explained(http, text, "api")["hit"] is False
    assert chat(client, f"Never mind. {text}", "api\nedited")[1] == edited["tokens"]

    path = f"/memories/{edited['id']}"
    assert http.delete(path, params={"namespace": "api"}).json()["deleted"] is True
    assert http.get(path, params={"namespace": "api"}).status_code == 404 and not listed(http, "api")
    assert chat(client, f"Never mind. {text}", "api\ndeleted")[1] < 32


def test_one_namespaces_memories_are_not_seen_or_hit_by_another(http: httpx.Client, client: OpenAI) -> None:
    text = TEXTS[1]
    memory = create(http, "mine", text=text, name="secret")
    path, other = f"/memories/{memory['id']}", {"namespace": "other"}
    assert memory["id"] not in listed(http, "other") and memory["id"] not in listed(http)
    for wanted in (path, "/memories/secret"):
        assert http.get(wanted, params=other).status_code == http.delete(wanted, params=other).status_code == 404
    assert http.post(f"{path}/pin", json={"ttl_s": 5, **other}).status_code == 404
    told = explained(http, text, "other")
    assert (told["hit"], told["memory"]) == (False, None) and "no memory" in told["reason"]
    assert chat(client, text, "other")[1] == chat(client, text, "minefield")[1] == 0
    assert chat(client, text, "mine")[1] == memory["tokens"]
    for namespace in ("mine\nx", "../mine", "a b"):
        assert http.get("/memories", params={"namespace": namespace}).status_code == 400
        assert http.post("/memories", json={"text": text, "namespace": namespace}).status_code == 400


def test_chat_turns_and_a_clients_own_memories(http: httpx.Client, client: OpenAI, files: VLLMServerBackend) -> None:
    turns = [{"role": "user", "content": TEXTS[2]}, {"role": "assistant", "content": "I have read it."}]
    memory = create(http, "turns", messages=turns)
    asked = [*turns, {"role": "user", "content": QUERY}]
    answer = client.chat.completions.create(
        model=MODEL, messages=asked, max_tokens=2, temperature=0, extra_body={"cache_salt": "turns"}
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == memory["tokens"]
    python_client = on_server(files, namespace="turns")
    item = python_client.extract(TEXTS[0])
    shown = listed(http, "turns")[item.kv_cache_id]
    assert not shown["persistent"] and shown["tokens"] == item.metadata.token_count


def test_a_pin_ends_with_its_time(http: httpx.Client, client: OpenAI) -> None:
    memory = create(http, "pins", text=TEXTS[3])
    path = f"/memories/{memory['id']}"
    pinned = http.post(f"{path}/pin", json={"ttl_s": 600, "namespace": "pins"}).json()
    assert pinned["pinned_tokens"] == BLOCK_TOKENS and 500 < pinned["pinned_s"] <= 600
    for number in range(2):  # more than the engine's blocks hold
        chat(client, TEXTS[0] * 6, f"many {number}")
    assert chat(client, TEXTS[3], "pins", kv_transfer_params={"kvmem_inject": False})[1] == BLOCK_TOKENS
    assert 0 < http.get(path, params={"namespace": "pins"}).json()["pinned_s"] < pinned["pinned_s"]
    http.post(f"{path}/pin", json={"ttl_s": 0.01, "namespace": "pins"})
    time.sleep(0.05)
    assert http.get(path, params={"namespace": "pins"}).json()["pinned_s"] is None
    http.post(f"{path}/pin", json={"namespace": "pins"})
    assert http.delete(f"{path}/pin", params={"namespace": "pins"}).json()["pinned_s"] is None


def test_what_is_refused(http: httpx.Client, client: OpenAI, url: str, tmp_path: Path) -> None:
    assert httpx.get(f"{url}/memories").status_code == httpx.post(f"{url}/memories", json={}).status_code == 401
    for body in ({}, {"text": "a", "messages": []}, {"text": ""}, {"text": "word " * 3000}, {"text": "a", "no": 1}):
        assert http.post("/memories", json=body).status_code == 400, body
    forged = {"kvmem_explain": [1, 2], "kvmem_admin_key": "", "kvmem_pin": "a", "kvmem_unpin": ["a"]}
    _, _, report = chat(client, "A text.", None, kv_transfer_params=forged)
    assert report["explained"] == report["pins"] == {} and "takes no pins" in report["pin_error"]
    assert httpx.get(url.removesuffix("/v1") + "/health/memories").json() == {"status": "ok"}
    assert "is full" in store_fault(tmp_path, 2 * shutil.disk_usage(tmp_path).total) and not store_fault(tmp_path, 1)
    assert "can't be reached" in store_fault(tmp_path / "gone", 1)


def test_a_restarted_server_hits_at_once_and_drains(
    http: httpx.Client, client: OpenAI, url: str, store: Path, tmp_path: Path
) -> None:
    """A memory that was created, and one that the server has learned by itself."""
    memory = create(http, "", text=TEXTS[0])
    cold, _, _ = chat(client, TEXTS[0], "elsewhere")
    learn(client, url, LONG, "regular")
    (itself,) = http.get("/memories", params={"namespace": "regular"}).json()["data"]
    cold_long, _, _ = chat(client, LONG, "elsewhere")
    kept = tmp_path / "store"
    kept.mkdir()
    for name in (memory["file"], itself["file"]):
        shutil.copy(store / name, kept)
    with running_process(kept, tmp_path / "log", *LEARNING, "--drain-s", "60") as (new_url, process):
        again = OpenAI(base_url=new_url, api_key=KEY, max_retries=0)
        assert chat(again, LONG, "regular")[:2] == (cold_long, itself["tokens"]), "what was learned survives"
        assert metrics(new_url)["vllm:external_prefix_cache_hits_total"] == itself["tokens"]
        assert metrics(new_url)['kvmem:bytes{tier="learned"}'] == itself["bytes"]
        assert chat(again, TEXTS[0])[:2] == (cold, memory["tokens"]), "the first request is a hit"
        stream = again.chat.completions.create(
            model=MODEL,
            messages=as_turns(TEXTS[0], QUERY),
            max_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.usage.completion_tokens == 64, "a running request ends whole"
        assert process.wait(60) == 0
    assert (kept / memory["file"]).is_file()
