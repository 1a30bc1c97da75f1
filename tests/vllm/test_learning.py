"""Memories that the server makes of its traffic: a plain OpenAI client, by the engine's own counts."""

from __future__ import annotations

import httpx
import pytest
from openai import OpenAI

from kvmem.engines.vllm.connector.protocol import INJECT
from tests.helpers.tiny import pairs
from tests.vllm.plain_client import chat, learn, metrics
from tests.vllm.serving import BLOCK_TOKENS, KEY, LEARN_AFTER, QUERY

pytestmark = pytest.mark.timeout(420)
TEXT = pairs(1, 2200, seed=61)[0][0]
NAMESPACE = "learns"


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key=KEY, max_retries=0)


def report_of(client: OpenAI, text: str, salt: str) -> tuple[str, dict]:
    answer, _, report = chat(client, text, salt, kv_transfer_params={INJECT: True})
    return answer, report


def test_a_text_that_comes_again_becomes_a_memory_of_its_namespace(client: OpenAI, url: str) -> None:
    cold, _, _ = chat(client, TEXT, "elsewhere")
    before = metrics(url)
    learn(client, url, TEXT, NAMESPACE)
    after = metrics(url)
    grown = {name: after[name] - before[name] for name in after if name in before}
    tokens = int(grown["kvmem:learned_tokens_total"])
    assert grown["kvmem:learned_total"] == 1 and tokens >= 2 * BLOCK_TOKENS and tokens % BLOCK_TOKENS == 0
    assert grown["kvmem:failed_learns_total"] == grown["kvmem:learned_evictions_total"] == 0
    prompts = grown["vllm:prompt_tokens_total"]
    computed = grown['kvmem:prompt_tokens_total{source="computed"}']
    assert computed <= prompts - (LEARN_AFTER - 1) * tokens, "it is prefilled once"

    answer, report = report_of(client, TEXT, f"{NAMESPACE}\nother blocks")
    assert (answer, report["local_tokens"], report["injected_tokens"]) == (cold, 0, tokens)
    for salt in ("learns2", None, "other"):
        answer, report = report_of(client, TEXT, salt)
        assert (answer, report["injected_tokens"], report["memory"]) == (cold, 0, "")

    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as http:
        (shown,) = http.get("/memories", params={"namespace": NAMESPACE}).json()["data"]
        assert (shown["learned"], shown["persistent"], shown["tokens"]) == (True, True, tokens)
        assert after['kvmem:bytes{tier="learned"}'] - before['kvmem:bytes{tier="learned"}'] == shown["bytes"]
        whole = http.get(f"/memories/{shown['id']}", params={"namespace": NAMESPACE}).json()
        assert TEXT[:200] in whole["source"]
        asked = {"messages": [{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}]}
        told = http.post("/memories/explain", json={**asked, "namespace": NAMESPACE}).json()
        assert told["hit"] and f"The first {tokens} tokens came" in told["learning"]


@pytest.mark.parametrize("at", [0.05, 0.6])
def test_an_edited_text_is_never_served_from_what_was_learned(client: OpenAI, url: str, at: float) -> None:
    """By construction: an edit changes token ids, and what is injected is compared with them."""
    cut = int(at * len(TEXT))
    edited = f"{TEXT[:cut]} Not so. {TEXT[cut:]}"
    cold, _, _ = chat(client, edited, "elsewhere")
    answer, report = report_of(client, edited, f"{NAMESPACE}\nedited {at}")
    assert answer == cold
    if at < 0.5:
        assert report["injected_tokens"] == 0
