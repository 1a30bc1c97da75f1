"""Measures one cell of a run's folder anew on this machine, and compares it with the stored rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from experiments.audit.figures import name_of
from experiments.audit.finding import Finding
from experiments.config import compose
from experiments.execution import checkpoint, measure_one
from experiments.hardware import layout
from experiments.measurement import statistics
from experiments.results import Row, formatting, judged_figures, read_run
from kvmem.errors import ConfigError, did_you_mean


def measure_anew(folder: Path, cell: str | None = None) -> list[Finding]:
    """Measures a cell with the folder's config.yaml and compares intervals. Nothing is written into the folder.

    cell: its name in rows.jsonl ("0 256/32"), or the part behind the number; None is the smallest cell with a speed-up.

    The speed-ups decide. On the machine that measured the stored rows the times are told too: they move with its clocks
    from one run to the next by more than an interval within one run says.

    Raises ConfigError if the folder has no such cell or no configuration that this version reads.
    """
    stored = [row for row in read_run(folder).rows if judged_figures(row) is not None and "cell" in row.conditions]
    name = _chosen(stored, cell)
    path = folder / checkpoint.CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} has no {checkpoint.CONFIG}, so its cells can't be measured anew.")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    anew = measure_one(compose.validate(config), name)
    here = layout.conditions()["machine"]
    found = []
    for row in (row for row in stored if row.conditions["cell"] == name):
        there = row.conditions.get("machine")
        if there != here:
            text = f"measured on {there}, and this machine is {here}: only ratios are compared"
            found.append(Finding(name_of(row), text, differs=False))
        again = next((new for new in anew if (new.arm, new.scenario) == (row.arm, row.scenario)), None)
        found += [Finding(name_of(row), "no such row was measured anew")] if again is None else []
        found += [] if again is None else _compared(row, again, there == here)
    return found


def _chosen(stored: Sequence[Row], cell: str | None) -> str:
    names = list(dict.fromkeys(str(row.conditions["cell"]) for row in stored))
    if not names:
        raise ConfigError(
            "The folder has no row with a speed-up whose cell is named: there is nothing to measure anew."
        )
    if cell is None:
        smallest = min(stored, key=lambda row: (row.verdict != "ok", row.context_tokens + row.query_tokens))
        return str(smallest.conditions["cell"])
    for name in names:
        if cell in (name, name.partition(" ")[2]):
            return name
    raise ConfigError(f"The folder has no cell {cell!r}. {did_you_mean(cell, names)}")


def _compared(row: Row, again: Row, same_machine: bool) -> Iterator[Finding]:
    old, new = judged_figures(row), judged_figures(again)
    if old is None or new is None:
        reason = again.error.strip().splitlines()[-1:] or ["it has no speed-up"]
        yield Finding(name_of(row), f"the new measurement failed: {reason[0]}")
        return
    if again.verdict != "ok":
        yield Finding(name_of(row), f"the new measurement is {again.verdict}: {again.verdict_reason}")
    pairs = [("speed-up", "%", old.speedup_interval, new.speedup_interval, old.speedup_pct, new.speedup_pct)]
    if same_machine:
        for arm, a, b in (("injected", old.kv_arm, new.kv_arm), ("direct", old.direct_arm, new.direct_arm)):
            intervals = [statistics.median_interval(times.samples_s) for times in (a, b)]
            pairs.append((f"{arm} TTFT", " s", intervals[0], intervals[1], a.ttft_s, b.ttft_s))
    for what, unit, was, now, stored, anew in pairs:
        told = f"{what} {formatting.digits(stored)}{unit} stored, {formatting.digits(anew)}{unit} anew"
        if was is None or now is None:
            yield Finding(name_of(row), f"{told}; an interval needs {statistics.BATCHES} pairs", differs=False)
            continue
        overlap = was[0] <= now[1] and now[0] <= was[1]
        ends = " and ".join(f"{formatting.digits(low)} to {formatting.digits(high)}" for low, high in (was, now))
        says = "overlap" if overlap else "do not overlap"
        decides = what == "speed-up"
        yield Finding(name_of(row), f"{told}: the intervals {ends} {says}", differs=decides and not overlap)
