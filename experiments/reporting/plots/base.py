"""Rows as pictures; one plot, one file. Plots find their rows by themselves, so that adding one edits no list."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from matplotlib.figure import Figure

from experiments.reporting.theme import LIGHT, Theme, style
from experiments.results import Row, labels, ttft_of
from kvmem.registry import Registry


class Plot(ABC):
    """One kind of picture."""

    name: ClassVar[str]
    """Its file's name."""
    title: ClassVar[str]
    caption: ClassVar[str]
    place: ClassVar[int] = 100
    """Where it stands on a page; the lowest first."""

    @abstractmethod
    def draw(self, rows: Sequence[Row], theme: Theme) -> Figure | None:
        """The picture of those rows that it can show; None where there are none."""


def every() -> list[Plot]:
    """Every plot that there is, in the order of a page."""
    found = Registry(Plot, "experiments.reporting.plots", "plot").classes().values()
    return [cls() for cls in sorted(found, key=lambda cls: (cls.place, cls.name))]


def draw(rows: Sequence[Row], theme: Theme = LIGHT) -> dict[str, Figure]:
    """Every plot that these rows have figures for, by the name of its file."""
    figures = {plot.name: plot.draw(rows, theme) for plot in every()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def svg(figure: Figure, theme: Theme) -> bytes:
    """A figure on a transparent ground, the same bytes for the same rows."""
    target = io.BytesIO()
    with style(theme):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return target.getvalue()


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes a PNG of every plot into `folder`, which is made; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in draw(rows).items():
        paths.append(folder / f"{name}.png")
        with style(LIGHT):
            figure.savefig(paths[-1], dpi=160)
    return paths


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that belong in one line of panels: one scenario, model and set of conditions."""
    names = [name for name in labels.varying(rows) if name not in ("dtype", "hardware")]
    several = len({row.scenario for row in rows}) > 1
    groups: dict[str, list[Row]] = {}
    for row in rows:
        parts = [row.scenario] * several + [row.model, row.dtype, row.hardware]
        parts += [f"{name} {value}" for name in names if (value := labels.condition(row, name)) is not None]
        groups.setdefault(" · ".join(filter(None, parts)), []).append(row)
    return groups


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that compare an arm with the direct one."""
    return [row for row in rows if ttft_of(row)]


def tick(time_s: float) -> str:
    """A round time without the digits that a figure has: 50 ms, 2 s, 0.25 s."""
    if time_s <= 0:
        return "0" if time_s == 0 else ""
    scale, unit = (1, "s") if time_s >= 1 else (1e3, "ms") if time_s >= 1e-3 else (1e6, "µs")
    return f"{time_s * scale:.4g} {unit}"
