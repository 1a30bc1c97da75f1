"""The findings as a page of the documentation, in Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import transformers

from experiments.conformance.checks import Findings

Verdict = Literal["exact", "partly", "refused", "failed", "untested"]

INTRODUCTION = """\
# Models that were tried

`python -m experiments.conformance` writes this page; here with transformers {transformers} and torch {torch}, on a CPU.
The command asks transformers for its list of causal language models, makes a tiny model with random weights of each
from the family's own config class (`experiments/conformance/recipes.yaml` says how), and runs kvmem on it in fp32.
`python -m experiments.conformance llama gemma3` shows single ones, with every reason.

| exact | partly | refused | failed | untested |
| --: | --: | --: | --: | --: |
| {exact} | {partly} | {refused} | {failed} | {untested} |

- **exact**: with a memory, with a second query to it, with a memory that extends a base, with a memory that was dumped
  and loaded in each file format, and with one that moved from host memory to disk, was found there by the next process
  and moved back, {steps} greedy tokens and
  their logits are those of transformers' forward pass over the whole prompt without a cache. Logits may differ by a
  thousandth of their spread, which is fp32's rounding. The stored memory is unchanged after each answer.
- **partly**: some of these are exact, and the others are refused with the reason below.
- **refused**: the engine says when it opens the model why it does not cover it.
- **failed**: an answer differs, or something raised another error than kvmem's own.
- **untested**: no tiny model of this family could be made.

A merge strategy that is not exact by design is **approx.** where a measurement on the model shows that its keys can be
moved and its tokens recomputed, and it ran on two short memories: the cache stands for all tokens, and an answer comes
from it. [Merging](merging.md) says what each computes, and what is measured.

Bytes are those of the tiny model's memory in fp32: what each token takes, and what a memory takes besides. Layers with
a sliding window keep the last tokens only, so theirs are bytes a memory.
"""

SHOWN = {"exact": "exact", "approximate": "approx.", "refused": "refused", "failed": "**failed**"}


def verdict(findings: Findings, essential: Iterable[str]) -> Verdict:
    """What the page says of an architecture. essential: the checks that have to be exact."""
    if findings.untested:
        return "untested"
    if any(cell.outcome == "failed" for cell in findings.cells.values()):
        return "failed"
    outcomes = {findings.cells[name].outcome for name in essential if name in findings.cells}
    if outcomes == {"exact"}:
        return "exact"
    return "partly" if "exact" in outcomes else "refused"


def markdown(all_findings: Sequence[Findings], essential: Sequence[str], steps: int) -> str:
    """The page. essential: as in `verdict`; steps: greedy tokens of an answer."""
    by_verdict: dict[str, list[Findings]] = {name: [] for name in ("exact", "partly", "refused", "failed", "untested")}
    for findings in all_findings:
        by_verdict[verdict(findings, essential)].append(findings)
    counts = {name: len(found) for name, found in by_verdict.items()}
    text = INTRODUCTION.format(transformers=transformers.__version__, torch=torch.__version__, steps=steps, **counts)
    parts = [text, "## Covered\n", _cells(by_verdict["exact"] + by_verdict["partly"])]
    if by_verdict["failed"]:
        parts += ["## Failed\n", _cells(by_verdict["failed"]), _reasons(by_verdict["failed"], "failed")]
    parts += ["## Refused when opened\n", _first_reasons(by_verdict["refused"])]
    parts += [
        "## Untested\n",
        _table(("Architecture", "Why"), [(f.architecture, f.untested) for f in by_verdict["untested"]]),
    ]
    parts += ["## Why a check is refused\n", _reasons(by_verdict["exact"] + by_verdict["partly"], "refused")]
    return "\n".join(parts)


def lines(findings: Findings) -> list[str]:
    """The findings on one architecture for the terminal: one line for each check, with its reason."""
    if findings.untested:
        return [f"{findings.architecture}: untested. {findings.untested}"]
    sizes = (
        []
        if findings.bytes_per_token is None
        else [f"  {findings.bytes_per_token} bytes a token, {findings.bytes_per_memory} bytes a memory besides"]
    )
    cells = [f"  {name}: {cell.outcome}{f'. {cell.why}' if cell.why else ''}" for name, cell in findings.cells.items()]
    return [f"{findings.architecture} ({findings.model_class}, {findings.seconds:.1f} s)", *cells, *sizes]


def _cells(some: Sequence[Findings]) -> str:
    if not some:
        return "None.\n"
    some = sorted(some, key=lambda findings: findings.architecture)
    names = list(some[0].cells)
    rows = [
        (
            findings.architecture,
            *(SHOWN[findings.cells[name].outcome] for name in names),
            *(str(size) if size is not None else "" for size in (findings.bytes_per_token, findings.bytes_per_memory)),
        )
        for findings in some
    ]
    return _table(("Architecture", *(_heading(name) for name in names), "Bytes a token", "Bytes a memory"), rows)


def _heading(name: str) -> str:
    return f"`{name}`" if name.startswith(".") or "_" in name else name[:1].upper() + name[1:]


def _first_reasons(some: Sequence[Findings]) -> str:
    """One row for each reason of the first check, that of opening the model, with the architectures that have it."""
    by_reason: dict[str, list[str]] = {}
    for findings in some:
        by_reason.setdefault(_of_any(findings, next(iter(findings.cells.values())).why), []).append(
            findings.architecture
        )
    return _table(("Architectures", "Why"), [(", ".join(names), reason) for reason, names in by_reason.items()])


def _reasons(some: Sequence[Findings], outcome: str) -> str:
    """One row for each reason of a check, with the checks and the architectures that have it."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for findings in sorted(some, key=lambda findings: findings.architecture):
        checks: dict[str, list[str]] = {}
        for name, cell in findings.cells.items():
            if cell.outcome == outcome:  # checks with the same reason, but for their own names, share a row
                checks.setdefault(_of_any(findings, cell.why.replace(name, "it")), []).append(_heading(name))
        for reason, names in checks.items():
            by_reason.setdefault((", ".join(names), reason), []).append(findings.architecture)
    rows = [(names, reason, ", ".join(architectures)) for (names, reason), architectures in sorted(by_reason.items())]
    return _table(("Checks", "Why", "Architectures"), rows)


def _of_any(findings: Findings, reason: str) -> str:
    """The reason without the name of the architecture and what was measured on it, so that those with the same reason
    share a row."""
    reason = re.sub(r" by [\d.e+-]+ of (their|its) size", "", reason)
    names = (rf"{findings.model_class} \(model_type [\w.-]+\)", *map(re.escape, findings.names))
    return re.sub(rf"(?<![\w-])({'|'.join(names)})(?![\w-])", "this model", reason)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "None.\n"
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, [":--"] * len(heads), *escaped]) + "\n"


def summary(all_findings: Sequence[Findings], essential: Sequence[str]) -> str:
    """The counts of all verdicts, as one line."""
    counts = Counter(verdict(findings, essential) for findings in all_findings)
    return ", ".join(f"{counts[name]} {name}" for name in ("exact", "partly", "refused", "failed", "untested"))
