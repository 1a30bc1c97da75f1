"""The rules that published figures can be held to: they state their medians, and no samples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from experiments.hardware import CARDS, Hardware, read_card
from experiments.measurement.verdict import beats_limit, direct_too_slow
from experiments.performance_model import DenseShape, Roofline, datasheet
from experiments.results.published import PublishedRow
from kvmem.models import loading

PUBLISHED_DTYPE = "bfloat16"
ArmName = Literal["direct", "injected"]


@dataclass(frozen=True)
class Finding:
    """One rule that a published row fails."""

    row: PublishedRow
    rule: Literal["limit", "slow_direct", "larger_is_faster"]
    reason: str
    arm: ArmName | None = None
    """The arm that fails; None if the rule is about both arms."""


def validate_published(rows: Iterable[PublishedRow]) -> list[Finding]:
    """The rules that published rows fail, as far as the published figures allow a check.

    limit             the row states its hardware, and an arm is faster than the makers' peak rates allow. The direct
                      arm prefills memory and prompt, the injected arm the prompt behind the memory
    slow_direct       the row states its build, and the direct arm takes more than 1.2 × (build + injected)
    larger_is_faster  a model of at least twice the weights is faster with both arms in the same cell of the same table,
                      on the same stated or unstated hardware; the two models were not run alike
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
                if reason := beats_limit(arm, ttft_s, limit_s):
                    findings.append(Finding(row, "limit", reason, arm))
        if row.build_s is not None and (reason := direct_too_slow(row.direct_ttft_s, row.build_s, row.kv_ttft_s)):
            findings.append(Finding(row, "slow_direct", reason, "direct"))
        findings += [Finding(row, "larger_is_faster", reason) for reason in _larger_is_faster(row, rows)]
    return findings


def hardware_card(stated: str) -> Hardware | None:
    """The card of a layout that a table states as, say, "4090 (2 Nodes 16 GPUs)"; None if there is no such card."""
    layout = re.fullmatch(r"(?P<gpu>\w+) \((\d+ Nodes )?(?P<gpus>\d+) GPUs\)", stated)
    if layout is None:
        return None
    count = "" if layout["gpus"] == "1" else f"x{layout['gpus']}"
    path = CARDS / f"{layout['gpu'].lower()}{count}.yaml"
    return read_card(path) if path.is_file() else None


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
