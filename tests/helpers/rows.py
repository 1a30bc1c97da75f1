"""Sample rows for the tests of tables, plots, sinks and the report."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.results.row import Row
from experiments.scenarios.kv_vs_direct import KVvsDirectPayload
from experiments.scenarios.storage import StoragePayload

CONDITIONS = {
    "commit": "0123abc",
    "versions": {"torch": "2.13.0", "transformers": "5.19.0"},
    "kernel": "sdpa",
    "graphs": False,
    "threads": 2,
    "temperature_c": 51.0,
}


ROW_FIELDS = {field.name for field in dataclasses.fields(Row)}


def ttft_row(context_tokens: int = 512, query_tokens: int = 32, **fields: Any) -> Row:
    """A valid row of kv_vs_direct with times that a CPU could have taken; `fields` are those of the row or payload."""
    kv_s = 2e-3 * query_tokens + 4e-6 * context_tokens
    direct_s = 1.4e-3 * (context_tokens + query_tokens)
    speedup = 100 * (1 - kv_s / direct_s)
    figures: dict[str, Any] = dict(
        question="What does `with` do?",
        answers={"injected": "It runs a block in a context.", "direct": "It runs a block in a context."},
        build_s=direct_s * 0.95,
        kv_bytes=context_tokens * 46080,
        kv_ttft_s=kv_s,
        direct_ttft_s=direct_s,
        kv_user_ttft_s=kv_s + 2e-3,
        direct_user_ttft_s=direct_s + 3e-3,
        speedup_pct=speedup,
        speedup_interval=(speedup - 0.8, speedup + 0.4),
        break_even_queries=1.1,
        cached_tokens=context_tokens - 1,
        limit_s=kv_s / 1.8,
        direct_limit_s=direct_s / 1.6,
        mfu=0.55,
        kv_ttft_all_s=[kv_s * f for f in (0.97, 0.99, 1.0, 1.02, 1.1)],
        direct_ttft_all_s=[direct_s * f for f in (0.98, 0.99, 1.0, 1.01, 1.05)],
    )
    figures |= {name: value for name, value in fields.items() if name not in ROW_FIELDS}
    identity: dict[str, Any] = dict(
        model="SmolLM2-135M-Instruct",
        weights="packaged Q4_1",
        dtype="float32",
        backend="huggingface",
        attention="sdpa",
        hardware="cpu, 2 cores",
        scenario="kv_vs_direct",
        merge="Reprefill",
        tier="device",
        arm="injected",
        context_tokens=context_tokens,
        query_tokens=query_tokens,
        pairs=5,
        equality="tokens",
        logit_max_abs_diff=2e-5,
        verdict="ok",
        conditions=dict(CONDITIONS),
        payload=KVvsDirectPayload(**figures),
    )
    return Row(**(identity | {name: value for name, value in fields.items() if name in ROW_FIELDS}))


def grid() -> list[Row]:
    """Nine valid rows: three contexts × three queries."""
    return [ttft_row(context, query) for context in (256, 512, 1024) for query in (32, 64, 128)]


def invalid_row(**fields: Any) -> Row:
    return ttft_row(**{"verdict": "invalid", "verdict_reason": "direct is 1.9 × (build + injected)", **fields})


def failed_row(**fields: Any) -> Row:
    error = 'Traceback (most recent call last):\n  File "a.py", line 1\nkvmem.errors.PromptError: 9000 tokens > 8192'
    nothing = dict(equality=None, logit_max_abs_diff=None, verdict=None, payload=None)
    return ttft_row(**{**nothing, "status": "failed", "error": error, "pairs": 0, **fields})


def published_row(context: str = "long", query: str = "short", **fields: Any) -> Row:
    """A row of Qwen3-8B in a cell that was published too."""
    tokens = {"long": 6064, "medium": 2773, "short": 583}[context], {"long": 953, "medium": 303, "short": 167}[query]
    sample: dict[str, Any] = dict(
        model="Qwen3-8B",
        weights="random",
        dtype="bfloat16",
        hardware="NVIDIA H100",
        pairs=30,
        build_s=0.195,
        kv_ttft_s=0.0326,
        direct_ttft_s=0.2053,
        speedup_pct=84.1,
        speedup_interval=(83.9, 84.4),
        equality="near_tie",
        first_difference=7,
        near_tie_margin=0.031,
        context_label=context,
        query_label=query,
    )
    return ttft_row(*tokens, **(sample | fields))


def storage_row(**fields: Any) -> Row:
    """A row of a scenario that has figures of its own and no TTFT."""
    payload = StoragePayload(
        format="safetensors",
        kv_bytes=1_000_000_000,
        dump_s=0.84,
        torch_save_s=1.2,
        dump_ratio=0.7,
        load_s=0.31,
        torch_load_s=1.55,
        load_ratio=0.2,
        dump_all_s=[0.84],
        torch_save_all_s=[1.2],
        load_all_s=[0.31],
        torch_load_all_s=[1.55],
    )
    return ttft_row(
        **{"scenario": "storage", "query_tokens": 0, "equality": None, "pairs": 0, "payload": payload, **fields}
    )
