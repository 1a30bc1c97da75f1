"""Decides whether a TTFT figure is valid. The same rules apply to measured cells and to the published tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from experiments.hardware import CARDS, Hardware, read_card
from experiments.performance_model import DenseShape, Roofline, datasheet
from experiments.results.published import PublishedRow
from kvmem.models import loading

MAX_DIRECT_RATIO = 1.2
"""The longest valid time of the direct arm, as a multiple of build + merge + injected prefill.

One direct pass does the work of all three, so a fair direct arm takes no longer than their sum, plus 20% for noise.
"""
PUBLISHED_DTYPE = "bfloat16"
ArmName = Literal["direct", "injected"]


@dataclass(frozen=True)
class Verdict:
    """Whether a figure is valid. `reason` lists every rule that failed, or is a remark on a valid figure."""

    verdict: Literal["ok", "invalid"]
    reason: str = ""


def validate_cell(
    *,
    direct_digest: str,
    injected_digest: str,
    cached_tokens: int,
    expected_tokens: int,
    kv_ttft_s: float,
    direct_ttft_s: float,
    kv_limit_s: float,
    direct_limit_s: float,
    build_s: float,
    equality: str,
    exact: bool,
    direct_cached_tokens: int = 0,
    merge_s: float = 0.0,
) -> Verdict:
    """Applies the rules to one cell with a direct and an injected arm.

    1. Both arms received the same token ids. `direct_digest` and `injected_digest` are hashes of all ids.
    2. The cache hit has the expected length. A shorter hit is not an injection, and a longer one covers part of the
       query. The direct arm has no hit.
    3. No arm is faster than the hardware's limit. A faster arm did not do the whole work.
    4. The direct baseline is not too slow: direct <= 1.2 × (build + merge + injected). `merge_s` is 0 for one memory.
    5. The answers do not diverge if the merge strategy is `exact`. For other strategies a divergence is a remark.
    """
    failed = []
    if direct_digest != injected_digest:
        failed.append(f"the arms received different token ids ({direct_digest} direct, {injected_digest} injected)")
    if cached_tokens != expected_tokens:
        failed.append(f"{cached_tokens} tokens came from the cache, {expected_tokens} were expected")
    if direct_cached_tokens:
        failed.append(f"{direct_cached_tokens} tokens of the direct arm came from a cache, so it was not cold")
    failed += filter(
        None, [_beats_limit("injected", kv_ttft_s, kv_limit_s), _beats_limit("direct", direct_ttft_s, direct_limit_s)]
    )
    failed += filter(None, [_direct_too_slow(direct_ttft_s, build_s, kv_ttft_s, merge_s)])
    if equality == "diverged" and exact:
        failed.append("the answers diverge, and the strategy is exact")
    if failed:
        return Verdict("invalid", "; ".join(failed))
    return Verdict(
        "ok", "the answers diverge, which is possible because this merge is not exact" if equality == "diverged" else ""
    )


@dataclass(frozen=True)
class Finding:
    """A published row that fails a rule."""

    row: PublishedRow
    rule: Literal["limit", "slow_direct", "larger_is_faster"]
    reason: str
    arm: ArmName | None = None
    """The arm that fails; None if the rule is about both arms."""


def validate_published(rows: Iterable[PublishedRow]) -> list[Finding]:
    """The rules that published rows fail. Rules that need figures that a row does not state are skipped.

    limit             An arm is faster than the vendor's peak rates allow on the stated hardware. The direct arm
                      prefills memory and prompt, the injected arm only the prompt.
    slow_direct       The direct arm takes more than 1.2 × (build + injected), where the build is stated.
    larger_is_faster  A model with at least twice the weights is faster with both arms, in the same cell of the same
                      table and on the same hardware. So the two models were not measured under the same conditions.
    """
    rows = list(rows)
    findings = []
    for row in rows:
        if hardware_card(row.hardware) is not None:
            roofline = _roofline(row.model, row.hardware)
            query, context = round(row.query_tokens), round(row.context_tokens)
            arms: tuple[tuple[ArmName, float, float], ...] = (
                ("injected", row.kv_ttft_s, roofline.limit_s(query, context)),
                ("direct", row.direct_ttft_s, roofline.limit_s(context + query, 0)),
            )
            for arm, ttft_s, limit_s in arms:
                if reason := _beats_limit(arm, ttft_s, limit_s):
                    findings.append(Finding(row, "limit", reason, arm))
        if row.build_s is not None and (reason := _direct_too_slow(row.direct_ttft_s, row.build_s, row.kv_ttft_s)):
            findings.append(Finding(row, "slow_direct", reason, "direct"))
        findings += [Finding(row, "larger_is_faster", reason) for reason in _larger_is_faster(row, rows)]
    return findings


def hardware_card(stated: str) -> Hardware | None:
    """The card of a layout that a table states, such as "4090 (2 Nodes 16 GPUs)"; None if there is no such card."""
    layout = re.fullmatch(r"(?P<gpu>\w+) \((\d+ Nodes )?(?P<gpus>\d+) GPUs\)", stated)
    if layout is None:
        return None
    count = "" if layout["gpus"] == "1" else f"x{layout['gpus']}"
    path = CARDS / f"{layout['gpu'].lower()}{count}.yaml"
    return read_card(path) if path.is_file() else None


def _beats_limit(arm: ArmName, ttft_s: float, limit_s: float) -> str | None:
    if ttft_s >= limit_s:
        return None
    return f"the {arm} arm took {1e3 * ttft_s:.4g} ms, and the hardware needs {1e3 * limit_s:.4g} ms for this work"


def _direct_too_slow(direct_s: float, build_s: float, kv_s: float, merge_s: float = 0.0) -> str | None:
    if direct_s <= MAX_DIRECT_RATIO * (build_s + merge_s + kv_s):
        return None
    work, seconds = ("build, merge", f"{build_s:.4g} + {merge_s:.4g}") if merge_s else ("build", f"{build_s:.4g}")
    return (
        f"the direct baseline is too slow: it took {direct_s:.4g} s for the work of {work} and injected arm, "
        f"which took {seconds} + {kv_s:.4g} s"
    )


def _larger_is_faster(row: PublishedRow, rows: Iterable[PublishedRow]) -> list[str]:
    weights = _weights(row.model)
    cell = (row.table, row.hardware, row.context, row.query)
    return [
        f"{other.model} is faster in the same cell: {1e3 * other.kv_ttft_s:.4g} and {1e3 * other.direct_ttft_s:.4g} ms "
        f"instead of {1e3 * row.kv_ttft_s:.4g} and {1e3 * row.direct_ttft_s:.4g} ms"
        for other in rows
        if (other.table, other.hardware, other.context, other.query) == cell
        and _weights(other.model) >= 2 * weights
        and other.kv_ttft_s < row.kv_ttft_s
        and other.direct_ttft_s < row.direct_ttft_s
    ]


@cache
def _roofline(model: str, hardware: str) -> Roofline:
    card = hardware_card(hardware)
    assert card is not None
    return Roofline(datasheet(card, PUBLISHED_DTYPE), loading.shape_config(model.lower()))


@cache
def _weights(model: str) -> int:
    return DenseShape.of(loading.shape_config(model.lower())).weights
