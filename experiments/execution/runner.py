"""Measures the cells of one run, and writes its rows, tables, plots and report into the run's folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from experiments import signals
from experiments.bench import Bench
from experiments.config import RunConfig
from experiments.execution import checkpoint, progress
from experiments.hardware import layout
from experiments.measurement import from_rank0, statistics, verdict
from experiments.reporting import findings, tables, write_report
from experiments.results import Row, different_conditions, formatting, ttft_of
from experiments.sinks import JSONL, Guarded, Sink
from kvmem.engines.huggingface import HFRanksConfig
from kvmem.errors import ConfigError, did_you_mean

log = logging.getLogger("experiments")

WRONG_COMMAND, NOT_ALL_VALID, UNDECIDED = 2, 1, 3
"""Exit statuses: the command or its configuration is wrong; a row failed or is not valid."""
ROWS_IN_A_LOG_LINE = 4
OUT_OF_MEMORY_ADVICE = (
    "Use a smaller model or a layout of more GPUs, or let the engine reserve less memory "
    "(backend.gpu_memory_utilization, backend.buffers)."
)


class JobFailed(Exception):
    """A job failed and has logged the reason. `exit_status` is the exit status of the process."""

    def __init__(self, exit_status: int, reason: str) -> None:
        super().__init__(exit_status, reason)
        self.exit_status = exit_status


def run(config: RunConfig, run_dir: Path, resolved: dict[str, Any], overrides: Sequence[str] = ()) -> list[Row]:
    """Measures every cell of `config`, writes rows, tables, plots and report into `run_dir`, and returns the rows.

    `resolved` is the configuration as plain cards. A cell that raises becomes a failed row, and the run continues with
    the next cell. Each row is written as soon as it is measured. Cells that are finished in `run_dir` are not measured
    again, unless they have an invalid or undecided row: then the new row replaces it, and names the earlier verdicts.

    Raises ConfigError if `run_dir` holds rows of another configuration, or if another process is writing to it.
    """
    with checkpoint.opened(run_dir, resolved) as done:
        rows = done.finished_rows()
        if done.finished:
            log.info("%s is already finished", run_dir)
        else:
            _write_conditions(config, run_dir, resolved, overrides)
            _measure_missing(config, run_dir, resolved, done, rows)
    return rows


def _measure_missing(
    config: RunConfig, run_dir: Path, resolved: dict[str, Any], done: checkpoint.Ledger, rows: list[Row]
) -> None:
    """Measures the cells that are not finished yet, and appends their rows to `rows`."""
    sinks: list[Sink] = [JSONL(), Guarded(config.sink, run_dir)]
    for sink in sinks:
        sink.check()
    config.scenario.check(config)
    bench = config.scenario.open(config)
    cells = cells_by_name(config.scenario.cells(bench))
    missing = {name: cell for name, cell in cells.items() if name not in done.cells}
    from_rank0(list(missing))
    for name in missing.keys() & done.earlier.keys():
        log.info("measuring %s again: it was %s", name, ", then ".join(done.earlier[name]))
    if len(missing) < len(cells):
        log.info("%d of %d cells are already finished", len(cells) - len(missing), len(cells))
    _warn_of_other_commits(rows)
    config.scenario.resume(rows)
    with ExitStack() as closing:
        for sink in sinks:
            sink.open(run_dir, resolved, rows)
            closing.push(partial(_close, sink, run_dir))
        for name, cell in zip(missing, progress.track(list(missing.values())), strict=True):
            found = measure_cell(config, bench, cell)
            signals.check()  # a cell that failed because it was interrupted has no row
            of_cell = {"cell": name} | ({"earlier_verdicts": done.earlier[name]} if name in done.earlier else {})
            for row in (replace(row, conditions=row.conditions | of_cell) for row in found):
                rows.append(row)
                for sink in sinks:
                    sink.write(row)
            if from_rank0(all(row.status == "done" for row in found)):
                done.finish(name)
        done.finished, done.ended = len(done.cells) == len(cells), True
        done.write()
        with checkpoint.writing(run_dir):
            write_report(run_dir)
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(tables.console_table(rows))
        if answer := findings.answer(rows):
            console.print(f"\n{answer}", markup=False, highlight=False)
    for name in ("report.html", "table.md", "rows.jsonl"):
        log.info("%s", run_dir / name)


def measure_one(config: RunConfig, name: str) -> list[Row]:
    """Measures one cell of `config` and writes nothing. `name`: as in a row's `conditions["cell"]`.

    Raises ConfigError if there is no such cell, or if the engine runs in several processes.
    """
    if isinstance(config.backend, HFRanksConfig):
        raise ConfigError("backend=hf_ranks measures in several processes, which only a whole run starts.")
    config.scenario.check(config)
    bench = config.scenario.open(config)
    cells = cells_by_name(config.scenario.cells(bench))
    if name not in cells:
        raise ConfigError(f"The configuration has no cell {name!r}. {did_you_mean(name, cells)}")
    rows = measure_cell(config, bench, cells[name])
    return [replace(row, conditions=row.conditions | {"cell": name}) for row in rows]


def _warn_of_other_commits(kept: Iterable[Row]) -> None:
    """Rows of two versions of the code are no longer one measurement."""
    others = {str(row.conditions.get("commit")) for row in kept} - {str(layout.commit())}
    if others:
        log.warning(
            "The finished cells were measured by commit %s, and this is commit %s. The folder will hold rows of both, "
            "so this run will end with status 3. In another folder all cells are measured by one version.",
            ", ".join(sorted(others)),
            layout.commit(),
        )


def problems(rows: Iterable[Row], exact: bool) -> list[str]:
    """The reasons for exit status 1: failed cells, invalid verdicts, and diverged answers of an exact merge."""
    found = []
    for row in rows:
        cell = f"{row.model} {row.scenario} {row.context_tokens}/{row.query_tokens}"
        if row.status == "failed":
            found.append(f"{cell}: failed: {row.error.strip().splitlines()[-1]}")
        elif row.verdict == "invalid":
            found.append(f"{cell}: invalid: {row.verdict_reason}")
        elif (
            row.equality == "diverged"
            and (exact or row.memories == 1)
            and not (row.payload and row.payload.may_diverge)
        ):
            found.append(f"{cell}: the injected arm's answer diverged from the direct arm's")
    return found


def doubts(rows: Iterable[Row]) -> list[str]:
    """The reasons for exit status 3: rows without a verdict, because their samples are too few or too noisy."""
    return [
        f"{row.model} {row.scenario} {row.context_tokens}/{row.query_tokens}: undecided: {row.verdict_reason}"
        for row in rows
        if row.verdict == "undecided"
    ]


def advice_on_noise(rows: Iterable[Row]) -> str:
    """What to do where rows have pairs enough, and their samples are too noisy for a verdict; "" if none are."""
    noisy = [row for row in rows if row.verdict == "undecided" and row.pairs >= statistics.BATCHES]
    if not noisy:
        return ""
    settings = " or ".join(sorted({f"a larger {verdict.pairs_setting(row)}" for row in noisy}))
    return (
        "Samples were too noisy. End other programs on this machine. On a CPU where one keeps a core busy, write "
        f"OMP_WAIT_POLICY=passive before the command. Or take more pairs ({settings}), in another folder."
    )


def mixtures(rows: Sequence[Row]) -> list[str]:
    """More reasons for exit status 3: what differs among rows that should be one measurement."""
    return [
        f"the rows have different values of {name}: "
        + ", ".join(f"{value} in {formatting.plural(count, 'row')}" for value, count in values.items())
        for name, values in different_conditions(rows).items()
    ]


def cells_by_name(cells: Sequence[Any]) -> dict[str, Any]:
    """A scenario's cells by their names in DONE.json."""
    return {f"{number} {cell.label}": cell for number, cell in enumerate(cells)}


def measure_cell(config: RunConfig, bench: Bench, cell: Any) -> list[Row]:
    """The rows of one cell, or one failed row if the cell raises."""
    started = time.perf_counter()
    try:
        rows = config.scenario.measure(bench, cell)
        for row in rows:
            row.to_json()  # raises for a NaN here, where it fails one cell, not the run
    except Exception as error:  # a long run continues with its other cells; the row has the traceback
        log.error("%s failed: %s: %s", cell.label, type(error).__name__, error, exc_info=config.tracebacks)
        return [config.scenario.failed(bench, cell, traceback.format_exc())]
    figures = "; ".join(map(_figures, rows)) if len(rows) <= ROWS_IN_A_LOG_LINE else formatting.plural(len(rows), "row")
    log.info("%s: %s (%.1f s)", cell.label, figures, time.perf_counter() - started)
    return rows


def _figures(row: Row) -> str:
    figures = ttft_of(row)
    if figures is None:
        return row.verdict or row.status
    ttft = f"TTFT {figures.kv_ttft_s * 1e3:.1f} ms injected, {figures.direct_ttft_s * 1e3:.1f} ms direct"
    return ", ".join(part for part in (ttft, row.equality, row.verdict) if part)


def _close(sink: Sink, run_dir: Path, kind: object, error: BaseException | None, at: object) -> None:
    """Closes a sink when its run ends. Of an interrupted run nothing is said: it is sent when it is finished."""
    line = sink.close(run_dir)
    if line and not isinstance(error, KeyboardInterrupt):
        log.info("%s", line)


def _write_conditions(config: RunConfig, run_dir: Path, resolved: dict[str, Any], overrides: Sequence[str]) -> None:
    card = dataclasses.asdict(config.backend)  # type: ignore[call-overload]  # each backend config is a dataclass
    resolved["backend"] |= card  # adds the values that come from the model and the layout
    machine = dataclasses.asdict(layout.inspect())
    environment = {"overrides": list(overrides), "machine": machine, "conditions": layout.conditions()}
    described = json.dumps(environment, indent=2, default=str) + "\n"
    with checkpoint.writing(run_dir):
        (run_dir / checkpoint.CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(resolved)), encoding="utf-8")
        (run_dir / "environment.json").write_text(described, encoding="utf-8")
