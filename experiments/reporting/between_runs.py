"""How far each figure moves between runs: the same cells, measured by several processes one after the other.

An interval within one run holds what varies from call to call. Clocks, memory layout and placement are drawn once a
process, and are seen between runs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments.results import Row, Run, TTFTPayload, formatting, in_order, judged_figures, read_run
from kvmem.errors import ConfigError

FILE = "between_runs.md"
TITLE = "Between runs"
REPEATS = "repeats"
"""The folder, in a run's folder, of the runs that repeat it."""
LEAST_RUNS = 3
COLUMNS = ("Cell", "ok in", "Speed-up", "Injected TTFT", "Spread", "Direct TTFT", "Spread", "Intervals of the speed-up")


def repeats_of(folder: Path) -> list[Path]:
    """The runs that repeat the run in `folder`, in order."""
    return sorted((path.parent for path in folder.glob(f"{REPEATS}/*/rows.jsonl")), key=in_order)


@dataclass(frozen=True)
class Spread:
    """A run beside those that repeat it, as a table."""

    note: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def spread_of(folder: Path) -> Spread | None:
    """The spread of a run's figures between it and its repeats; None if it has fewer than two."""
    repeats = repeats_of(folder)
    if len(repeats) + 1 < LEAST_RUNS:
        return None
    runs = [read_run(path) for path in (folder, *repeats)]
    note = (
        f"{len(runs)} runs, each a process of its own. Of each figure, which is a run's median, the lowest and the "
        "highest run; the spread is their difference over the median of the runs."
    )
    return Spread(note, COLUMNS, tuple(tuple(cells) for row in runs[0].rows if (cells := _cells(row, runs))))


def markdown(folder: Path) -> str:
    """The table of a run and its repeats. Raises ConfigError if there are fewer than three runs in all."""
    spread = spread_of(folder)
    if spread is None:
        raise ConfigError(
            f"{folder} has {formatting.plural(len(repeats_of(folder)), 'repeat')}, and a spread between runs needs "
            f"{LEAST_RUNS - 1}: python -m experiments.repeat {folder}"
        )
    lines = [
        f"### {TITLE}",
        "",
        spread.note,
        "",
        "| " + " | ".join(spread.columns) + " |",
        "| :-- | --: | --: | --: | --: | --: | --: | :-- |",
    ]
    lines += ["| " + " | ".join(cells) + " |" for cells in spread.lines]
    return "\n".join(lines) + "\n"


def _key(row: Row) -> tuple[str, ...]:
    cell = row.conditions.get("cell", f"{row.context_tokens}/{row.query_tokens}")
    return row.scenario, str(cell), row.arm, row.merge, row.tier


def _cells(first: Row, runs: Sequence[Run]) -> list[str]:
    """One line of the table; empty if the row has no TTFT that is judged."""
    if judged_figures(first) is None:
        return []
    rows = [row for run in runs for row in run.rows if _key(row) == _key(first)]
    name = " ".join(part for part in (f"{first.context_tokens}/{first.query_tokens}", first.arm) if part)
    ok = [figures for row in rows if row.verdict == "ok" and (figures := judged_figures(row)) is not None]
    told = [name, f"{len(ok)} of {len(runs)}"]
    if len(ok) < LEAST_RUNS:
        return told + [formatting.NONE] * (len(COLUMNS) - len(told))
    told.append(formatting.percent_range(_ends([figures.speedup_pct for figures in ok])))
    for times in ([figures.kv_ttft_s for figures in ok], [figures.direct_ttft_s for figures in ok]):
        low, high = _ends(times)
        told += [f"{formatting.seconds(low)} to {formatting.seconds(high)}"]
        told += [formatting.percent(100 * (high - low) / median(times))]
    return [*told, _overlap(ok)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _overlap(ok: Sequence[TTFTPayload]) -> str:
    """Whether one value lies in the intervals of all runs, so that they say the same."""
    intervals = [figures.speedup_interval for figures in ok if figures.speedup_interval is not None]
    if len(intervals) < len(ok):
        return formatting.NONE
    together = max(low for low, _ in intervals) <= min(high for _, high in intervals)
    return "overlap" if together else "do not overlap: the figure moves more between runs than within one"
