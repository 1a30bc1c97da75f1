"""Whether a TTFT figure can be trusted: four rules, and what the published tables look like under them."""

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

STRAW_MAN = 1.2
"""The direct arm does in one pass the work of the build, of a merge of several memories, and of the injected prefill,
so it can't honestly take longer than all of them; a fifth is left for noise."""
PUBLISHED_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Verdict:
    """`reason` holds every rule that failed, or what is worth knowing of a row that is ok."""

    verdict: Literal["ok", "invalid"]
    reason: str = ""


def judge(
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
    """Judges one cell of the direct arm against the injected one.

    1. Both arms ate the same token ids (`*_digest`: hash of all of them).
    2. The cache hit was the expected one: less is no injection, more is a query that was cached too. The direct arm had
       none.
    3. No arm beats the hardware's limit: then it did not do the work.
    4. The direct arm is no straw man: direct <= 1.2 × (build + merge + injected). merge_s: 0 for a single memory.
    5. The answers do not diverge, where the strategy is `exact`; for another one, divergence is its price, and is told.
    """
    failed = []
    if direct_digest != injected_digest:
        failed.append(f"the arms ate different token ids ({direct_digest} direct, {injected_digest} injected)")
    if cached_tokens != expected_tokens:
        failed.append(f"{cached_tokens} tokens came from the cache, {expected_tokens} were expected")
    if direct_cached_tokens:
        failed.append(f"{direct_cached_tokens} tokens of the direct arm came from a cache: it was not cold")
    failed += filter(
        None, [_beats_limit("injected", kv_ttft_s, kv_limit_s), _beats_limit("direct", direct_ttft_s, direct_limit_s)]
    )
    failed += filter(None, [_straw_man(direct_ttft_s, build_s, kv_ttft_s, merge_s)])
    if equality == "diverged" and exact:
        failed.append("the answers diverge, and the strategy is exact")
    if failed:
        return Verdict("invalid", "; ".join(failed))
    return Verdict(
        "ok", "the answers diverge: the price of this merge, which is not exact" if equality == "diverged" else ""
    )


@dataclass(frozen=True)
class Finding:
    """One rule that a published row fails."""

    row: PublishedRow
    rule: Literal["limit", "straw_man", "larger_is_faster"]
    reason: str


def judge_published(rows: Iterable[PublishedRow]) -> list[Finding]:
    """Which published rows fail which rule, as far as what was published lets one tell.

    limit: the row's hardware is stated, and beating the makers' peaks is impossible. The direct arm prefills memory and
    prompt, the injected arm the prompt behind the memory. straw_man: the row states its build. larger_is_faster: in the
    same table, the same cell and on the same stated or unstated hardware, a model of at least twice the weights is
    faster with both arms; then the two were not run alike.
    """
    rows = list(rows)
    findings = []
    for row in rows:
        if hardware_card(row.hardware) is not None:
            roofline = _roofline(row.model, row.hardware)
            query, context = round(row.query_tokens), round(row.context_tokens)
            found = [
                _beats_limit("injected", row.kv_ttft_s, roofline.limit_s(query, context)),
                _beats_limit("direct", row.direct_ttft_s, roofline.limit_s(context + query, 0)),
            ]
            findings += [Finding(row, "limit", reason) for reason in found if reason]
        if row.build_s is not None and (reason := _straw_man(row.direct_ttft_s, row.build_s, row.kv_ttft_s)):
            findings.append(Finding(row, "straw_man", reason))
        findings += [Finding(row, "larger_is_faster", reason) for reason in _larger_is_faster(row, rows)]
    return findings


def hardware_card(stated: str) -> Hardware | None:
    """The card of a layout as tables state it, "4090 (2 Nodes 16 GPUs)" or "H800 (4 GPUs)"; None: there is none."""
    layout = re.fullmatch(r"(?P<gpu>\w+) \((\d+ Nodes )?(?P<gpus>\d+) GPUs\)", stated)
    if layout is None:
        return None
    count = "" if layout["gpus"] == "1" else f"x{layout['gpus']}"
    path = CARDS / f"{layout['gpu'].lower()}{count}.yaml"
    return read_card(path) if path.is_file() else None


def _beats_limit(arm: str, ttft_s: float, limit_s: float) -> str | None:
    if ttft_s >= limit_s:
        return None
    return f"the {arm} arm took {1e3 * ttft_s:.4g} ms, and the hardware needs {1e3 * limit_s:.4g} ms for its work"


def _straw_man(direct_s: float, build_s: float, kv_s: float, merge_s: float = 0.0) -> str | None:
    if direct_s <= STRAW_MAN * (build_s + merge_s + kv_s):
        return None
    work, took = ("build, merge", f"{build_s:.4g} + {merge_s:.4g}") if merge_s else ("build", f"{build_s:.4g}")
    return (
        f"the direct arm is a straw man: {direct_s:.4g} s for the work of {work} and injected arm, "
        f"which take {took} + {kv_s:.4g} s"
    )


def _larger_is_faster(row: PublishedRow, rows: Iterable[PublishedRow]) -> list[str]:
    weights = _weights(row.model)
    cell = (row.table, row.hardware, row.context, row.query)
    return [
        f"{other.model} is faster in the same cell: {1e3 * other.kv_ttft_s:.4g} and {1e3 * other.direct_ttft_s:.4g} ms "
        f"against {1e3 * row.kv_ttft_s:.4g} and {1e3 * row.direct_ttft_s:.4g}"
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
