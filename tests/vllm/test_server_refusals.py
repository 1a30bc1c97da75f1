"""What goes wrong between a client and a vLLM server: each an error that names the server and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmem.backends import vllm_serve
from kvmem.errors import ConfigError, FingerprintError, ModelError, ServerError
from tests.vllm.serving import KEY_VARIABLE, MODEL, free_port, without_counts
from tests.vllm.test_server import Connect, connect, store, url

__all__ = ["connect", "store", "url"]  # fixtures

pytestmark = pytest.mark.timeout(420)


def test_a_model_that_is_not_served_names_those_that_are(connect: Connect, url: str) -> None:
    with pytest.raises(ServerError, match=rf"at {url} does not serve 'smollm3'\. Did you mean {MODEL}\? Choices"):
        connect(model="smollm3")


def test_no_server_there_names_the_address_and_how_to_start_one(connect: Connect) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ServerError, match=rf"No server answers at {nowhere}.*refused.*kvmem\.backends\.vllm_serve"):
        connect(base_url=nowhere)


def test_another_address_of_the_server_is_no_api(connect: Connect, url: str) -> None:
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
    assert "a key of the tests" not in repr(connect().config)


def test_a_server_that_is_too_slow(connect: Connect, url: str) -> None:
    backend = connect().backend
    prompt = backend.template.bare("word " * 1400)
    backend.client.stream_timeout = backend.client._timeout(0.05)
    backend.config.first_token_timeout_s = 0.05
    with pytest.raises(ServerError, match=rf"{MODEL} at {url} took longer than first_token_timeout_s=0\.05"):
        backend.ttft(prompt, cache_salt="slow")
