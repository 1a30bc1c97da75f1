"""Failures between a client and a vLLM server: each error names the server and the way out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from kvmem.engines.vllm.server import serve
from kvmem.engines.vllm.server.backend import VLLMServerBackend
from kvmem.errors import ConfigError, FingerprintError, InjectionError, ModelError, ServerError
from kvmem.models.loading import load
from tests.helpers.tiny import CPU
from tests.vllm.serving import MODEL, Connect, free_port, without_counts

pytestmark = pytest.mark.timeout(420)


def test_a_model_that_is_not_served_names_those_that_are(connect: Connect, url: str) -> None:
    with pytest.raises(ServerError, match=rf"at {url} does not serve 'smollm3'\. .*Choices: {MODEL}"):
        connect(model="smollm3")


def test_no_server_there_names_the_address_and_how_to_start_one(connect: Connect) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(
        ServerError, match=rf"No server answers at {nowhere} .*refused.*kvmem\.engines\.vllm\.server\.serve"
    ):
        connect(base_url=nowhere)


def test_an_address_of_the_server_that_is_not_its_api(connect: Connect, url: str) -> None:
    with pytest.raises(ServerError, match=r"no such address.*base_url ends with /v1"):
        connect(base_url=url.removesuffix("/v1"))


def test_a_wrong_key_and_none(connect: Connect, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMEM_TEST_WRONG_KEY", "not it")
    with pytest.raises(ServerError, match=rf"{url} refuses the key in KVMEM_TEST_WRONG_KEY"):
        connect(api_key_env="KVMEM_TEST_WRONG_KEY")
    with pytest.raises(ServerError, match=r"refuses requests without a key.*api_key_env"):
        connect(api_key_env=None)
    with pytest.raises(ConfigError, match="KVMEM_TEST_UNSET, which is not set"):
        connect(api_key_env="KVMEM_TEST_UNSET")


@pytest.mark.parametrize("knob", ["first_token_timeout_s", "whole_timeout_s"])
def test_a_server_that_is_too_slow(
    prefixes: VLLMServerBackend, url: str, monkeypatch: pytest.MonkeyPatch, knob: str
) -> None:
    prompt = prefixes.template.bare("word " * 1400)  # takes some seconds
    send = prefixes.ttft if knob == "first_token_timeout_s" else prefixes.answer_prompt
    monkeypatch.setattr(prefixes.config, knob, 0.1)
    with pytest.raises(ServerError, match=rf"{MODEL} at {url} took longer than {knob}=0\.1"):
        send(prompt, cache_salt=knob)


def test_counts_that_a_server_omits_always_or_at_zero(connect: Connect, url: str) -> None:
    with without_counts(url, zeros_only=False) as hiding, pytest.raises(ServerError) as refused:
        connect(base_url=hiding)
    assert re.search(rf"{hiding} does not report .*--enable-prompt-tokens-details", str(refused.value))
    with without_counts(url, zeros_only=True) as sparing:
        backend = connect(base_url=sparing).backend
        turns = [{"role": "system", "content": "A rule. " * 50}, {"role": "user", "content": "Which?"}]
        cold, hit = (backend.generate(turns, None, 2, cache_salt="zeros") for _ in range(2))
        assert (cold.cached_tokens, hit.cached_tokens) == (0, (hit.prompt_tokens - 1) // 128 * 128)


def test_another_tokenizer_than_the_servers(connect: Connect, store: Path, tmp_path: Path) -> None:
    other = load("random:tiny", CPU).tokenizer
    other.add_tokens(["letters"])
    other.save_pretrained(tmp_path)
    with pytest.raises(FingerprintError, match=r"has another tokenizer .*tokenizer_name_or_path"):
        connect(tokenizer_name_or_path=str(tmp_path))
    with pytest.raises(FingerprintError, match=r"tokenizer: .* on the server .*tokenizer_name_or_path"):
        connect(tokenizer_name_or_path=str(tmp_path), store_dir=str(store))
    with pytest.raises(ModelError, match="no such folder here"):
        connect(tokenizer_name_or_path="no such folder here")


def test_a_folder_that_is_not_the_servers_store(
    connect: Connect, files: VLLMServerBackend, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match=r"kvmem_server\.json can't be read .*--store"):
        connect(store_dir=str(tmp_path))
    shutil.copy(store / "kvmem_server.json", tmp_path)
    elsewhere = connect(store_dir=str(tmp_path))
    elsewhere.add(files.build("A rule of some words. " * 20))
    (item,) = elsewhere.get_all()
    with pytest.raises(InjectionError, match=r"can't be read.*deleted, or never saved"):
        elsewhere.backend.generate("Which rule?", elsewhere.get_cache(item.kv_cache_id), 2)


def test_unknown_keys_and_values(connect: Connect) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'url'\. .*Choices: .*base_url"):
        connect(url="http://localhost")
    with pytest.raises(ConfigError, match="on_miss"):
        connect(on_miss="ignore")


def test_the_launcher_names_what_it_can_not_start() -> None:
    pytest.importorskip("vllm")
    with pytest.raises(SystemExit, match=r"vllm_serve: Unknown shape random:nope\. Choices: .*tiny"):
        serve.main(["--model", "random:nope"])
    with pytest.raises(SystemExit, match=r"vllm_serve: Unknown dtype .float23.*float32"):
        serve.main(["--dtype", "float23"])
