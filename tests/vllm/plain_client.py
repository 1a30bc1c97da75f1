"""What a client does that knows nothing of kvmem: chats by the openai package, and a look at /metrics."""

from __future__ import annotations

import time
import urllib.request

from openai import OpenAI

from kvmem.engines.vllm.connector.protocol import REPORT
from tests.vllm.serving import LEARN_AFTER, MODEL, NEW_TOKENS, QUERY, as_turns


def chat(
    client: OpenAI, text: str, salt: str | None = None, query: str = QUERY, **more: object
) -> tuple[str, int, dict]:
    """The answer to a chat, how many prompt tokens came from a cache by the engine's count, and the report if any."""
    extra = {**more, **({} if salt is None else {"cache_salt": salt})}
    answer = client.chat.completions.create(
        model=MODEL, messages=as_turns(text, query), max_tokens=NEW_TOKENS, temperature=0, extra_body=extra
    )
    report = (answer.model_extra.get("kv_transfer_params") or {}).get(REPORT, {})
    return answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens, report


def learn(client: OpenAI, url: str, text: str, namespace: str) -> None:
    """Chats on a text, with other queries, until the server has made it a memory by itself."""
    before = metrics(url)["kvmem:learned_total"]
    for number in range(LEARN_AFTER):
        chat(client, text, namespace, f"Question {number}. {QUERY}")
    deadline = time.monotonic() + 60.0
    while metrics(url)["kvmem:learned_total"] == before:
        assert time.monotonic() < deadline, "the file is not written"
        chat(client, "Wait.", "nobody")  # the engine hears of the file's end in its next step


def metrics(url: str) -> dict[str, float]:
    """vLLM's /metrics: by name and labels, without the labels that all have."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line and line[0] != "#"]
    return {
        line.rpartition(" ")[0]
        .replace(f'engine="0",model_name="{MODEL}"', "")
        .replace("{,", "{")
        .replace("{}", ""): float(line.rpartition(" ")[2])
        for line in lines
    }
