"""How long should the published cells take on their hardware, and from which length does a memory pay off?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, field
from dataclasses import dataclass as plain_dataclass
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from experiments.bench import Setup
from experiments.hardware import Hardware, layout
from experiments.measurement import published_rules
from experiments.performance_model import (
    DenseShape,
    Engine,
    Fit,
    Layout,
    Point,
    Prefill,
    Tier,
    break_even_tokens,
    fit_engine,
    points_of,
    size_fleet,
)
from experiments.results import PREDICTED, Payload, Row, formatting, published, read_run
from experiments.results.published import PublishedRow
from experiments.scenarios.base import Scenario
from kvmem.errors import ConfigError
from kvmem.models import loading

GIVEN = "as given"


@plain_dataclass(frozen=True)
class Table:
    """A cell of this scenario: one table of predictions, with a function that computes its rows."""

    label: str
    rows: Callable[[], Iterator[Row]]


@plain_dataclass(frozen=True)
class PredictionInputs:
    """The inputs of every table. No model is loaded."""

    setup: Setup
    engine: Engine
    fit: Fit | None


@plain_dataclass(frozen=True, kw_only=True)
class PublishedCellPayload(Payload):
    """One published cell: predicted and published TTFT."""

    name: ClassVar[str] = "predict"

    table: str
    memory_tokens: int
    prompt_tokens: int
    direct_ttft_s: float
    published_direct_s: float
    direct_error_pct: float
    """100 × (predicted / published − 1)."""
    injected_ttft_s: float
    published_injected_s: float
    injected_error_pct: float
    speedup_pct: float
    published_speedup_pct: float
    published_beyond_its_hardware: str
    """The published arms that are faster than the vendor's peak rates allow, or "no"."""


@plain_dataclass(frozen=True, kw_only=True)
class _Errors:
    """The distribution of prediction errors. `median_error_pct` is signed; a size is an absolute value."""

    figures_compared: int
    median_error_pct: float
    median_size_pct: float
    p90_size_pct: float
    largest_size_pct: float
    within_15_pct: float
    """The share of errors of at most 15%, in percent."""
    within_30_pct: float


@plain_dataclass(frozen=True, kw_only=True)
class PublishedErrorPayload(_Errors, Payload):
    """Errors over the published cells of one table and hardware."""

    name: ClassVar[str] = "predict: error of the published cells"


@plain_dataclass(frozen=True, kw_only=True)
class FitErrorPayload(_Errors, Payload):
    """Errors of the fit, over the cells that it used or over the held-out cells."""

    name: ClassVar[str] = "predict: error of the fit"
    columns: ClassVar[tuple[str, ...]] = ("points_of", *_Errors.__dataclass_fields__)

    points_of: str
    """The arm of the cells, or "all"."""


@plain_dataclass(frozen=True, kw_only=True)
class EfficienciesPayload(Payload):
    """The efficiencies of an engine (`performance_model.Engine`)."""

    name: ClassVar[str] = "predict: efficiencies"

    products: float
    attention: float
    bandwidth: float
    interconnect: float
    host_link: float
    fixed_s: float
    launches_s: float


@plain_dataclass(frozen=True, kw_only=True)
class BreakEvenPayload(Payload):
    """The memory length from which loading from one tier is faster than recomputing."""

    name: ClassVar[str] = "predict: where loading beats recomputing"

    memory_in: str
    gb_per_second: float | None
    """The tier's bandwidth; None for a memory that is on the GPU already."""
    query_tokens: int
    loading_wins_from_tokens: int | None
    """None if loading is slower at every length."""
    memory_tokens: int
    fetch_s: float
    """Seconds of loading a memory of `memory_tokens` tokens."""


@plain_dataclass(frozen=True, kw_only=True)
class FleetPayload(Payload):
    """A request load, and the replicas, storage and network bandwidth that it needs."""

    name: ClassVar[str] = "predict: a fleet"

    requests_per_second: float
    memories: int
    memory_tokens: int
    query_tokens: int
    local_share: float
    replicas_direct: int
    replicas_injected: int
    storage_tb: float
    network_gb_per_second: float


@dataclass(config=ConfigDict(extra="forbid"))
class Predict(Scenario[PredictionInputs, Table]):
    """Predicts times from model shapes, vendors' data sheets and an engine's efficiencies. It needs no GPU."""

    fit_from: list[str] = field(default_factory=list)
    """Folders of runs. Half of their cells fit the efficiencies, the others give the error. [] uses the defaults."""
    not_stated: list[str] = field(default_factory=lambda: ["h100", "h100x2", "h100x4"])
    """Layouts for published cells that state none: the first one that holds the weights is used."""
    plan_model: str = "qwen3-8b"
    """The shape for the break-even lengths and the fleet.

    The layout is the hardware card's, or the first of `not_stated` that holds the weights if the card has no GPU.
    """
    query_tokens: int = Field(default=167, ge=1)
    memory_tokens: int = Field(default=6064, ge=1)
    memories: int = Field(default=1_000_000, ge=1)
    requests_per_s: float = Field(default=10_000, gt=0)
    local_share: float = Field(default=0.8, ge=0, le=1)
    """The share of the fleet's requests whose memory is on the GPU. The others fetch it over the network."""
    host_gb_s: float = Field(default=55, gt=0)
    disk_gb_s: float = Field(default=6, gt=0)
    network_gb_s: float = Field(default=12.5, gt=0)

    name: ClassVar[str] = "predict"
    question: ClassVar[str] = (
        "How long should the published cells take on their hardware, and from which length does a memory pay off?"
    )

    @classmethod
    def answer(cls, rows: Sequence[Row]) -> str:
        cells = [row.payload for row in rows if isinstance(row.payload, PublishedCellPayload)]
        if not cells:
            return ""
        direct, injected = (
            formatting.percent(median(abs(getattr(cell, f"{arm}_error_pct")) for cell in cells))
            for arm in ("direct", "injected")
        )
        beyond = sum(cell.published_beyond_its_hardware != "no" for cell in cells)
        return (
            f"Predicted, not measured: {len(cells)} cells beside their published times, from which the predictions "
            f"differ by {direct} (direct) and {injected} (injected) in the median. The hardware that a table names "
            f"can't reach {beyond} of the published cells."
        )

    def open(self, setup: Setup) -> PredictionInputs:
        found = fit_engine(list(self.measured_points()), setup.seed) if self.fit_from else None
        return PredictionInputs(setup, found.engine if found else Engine(), found)

    def cells(self, bench: PredictionInputs) -> Sequence[Table]:
        tables = [
            Table("published cells", lambda: self._published(bench)),
            Table("break-even lengths", lambda: self._break_even(bench)),
            Table("fleet", lambda: self._fleet(bench)),
        ]
        return [Table("fit", lambda: self._fitted(bench)), *tables] if bench.fit else tables

    def measure(self, bench: PredictionInputs, cell: Table) -> list[Row]:
        return list(cell.rows())

    def failed(self, bench: PredictionInputs, cell: Table, error: str) -> Row:
        return _row(None, "", GIVEN, scenario=cell.label, status="failed", error=error)

    def measured_points(self) -> Iterator[Point]:
        for folder in self.fit_from:
            for row in read_run(Path(folder)).rows:
                if row.status == "done" and row.verdict == "ok":
                    layout = self._layout(row.model, self._card(row.hardware), row.dtype)
                    yield from points_of(row, layout)

    def _published(self, inputs: PredictionInputs) -> Iterator[Row]:
        beyond = {
            (finding.row, finding.arm)
            for finding in published_rules.validate_published(published.tables())
            if finding.rule == "limit"
        }
        errors: dict[str, list[float]] = {}
        for cell in published.tables():
            layout = self._layout(cell.model, self._of(cell))
            query, context = round(cell.query_tokens), round(cell.context_tokens)
            direct = layout.ttft_s(Prefill(context + query, 0), inputs.engine)
            injected = layout.ttft_s(Prefill(query, context), inputs.engine)
            off = {"direct": _error_pct(direct, cell.direct_ttft_s), "injected": _error_pct(injected, cell.kv_ttft_s)}
            errors.setdefault(f"{cell.table}, {cell.hardware}", []).extend(off.values())
            impossible = [arm for arm in off if (cell, arm) in beyond]
            payload = PublishedCellPayload(
                table=cell.table,
                memory_tokens=context,
                prompt_tokens=query,
                direct_ttft_s=direct,
                published_direct_s=cell.direct_ttft_s,
                direct_error_pct=off["direct"],
                injected_ttft_s=injected,
                published_injected_s=cell.kv_ttft_s,
                injected_error_pct=off["injected"],
                speedup_pct=100 * (1 - injected / direct),
                published_speedup_pct=cell.speedup_pct,
                published_beyond_its_hardware=" and ".join(impossible) or "no",
            )
            yield _row(payload, cell.model, layout.hardware.name, context_tokens=context, query_tokens=query)
        for name, off_pct in errors.items():
            yield _row(PublishedErrorPayload(**_distribution(off_pct)), "all", name)

    def _fitted(self, inputs: PredictionInputs) -> Iterator[Row]:
        found = inputs.fit
        assert found is not None
        folders = ", ".join(self.fit_from)
        for name, points in (("fitted", found.fitted), ("held out", found.held_out)):
            arms = {"all": points} | {arm: [p for p in points if p.arm == arm] for arm in {p.arm for p in points}}
            for arm, some in arms.items():
                errors = [100 * error for error in found.errors(some)]
                yield _row(FitErrorPayload(points_of=arm, **_distribution(errors)), folders, name)
        yield _row(EfficienciesPayload(**asdict(found.engine)), folders, "fitted")
        yield _row(EfficienciesPayload(**asdict(Engine())), "default", "")

    def _break_even(self, inputs: PredictionInputs) -> Iterator[Row]:
        layout = self._plan_layout(inputs)
        for tier in self._tiers():
            tokens = break_even_tokens(layout, inputs.engine, tier, self.query_tokens)
            payload = BreakEvenPayload(
                memory_in=tier.name,
                gb_per_second=tier.gb_s,
                query_tokens=self.query_tokens,
                loading_wins_from_tokens=tokens,
                memory_tokens=self.memory_tokens,
                fetch_s=tier.fetch_s(layout, self.memory_tokens),
            )
            yield _row(payload, self.plan_model, layout.hardware.name)

    def _fleet(self, inputs: PredictionInputs) -> Iterator[Row]:
        layout = self._plan_layout(inputs)
        needed = size_fleet(
            layout,
            inputs.engine,
            self._tiers()[-1],
            requests_per_s=self.requests_per_s,
            memories=self.memories,
            memory_tokens=self.memory_tokens,
            query_tokens=self.query_tokens,
            local_share=self.local_share,
        )
        payload = FleetPayload(
            requests_per_second=self.requests_per_s,
            memories=self.memories,
            memory_tokens=self.memory_tokens,
            query_tokens=self.query_tokens,
            local_share=self.local_share,
            **asdict(needed),
        )
        yield _row(payload, self.plan_model, layout.hardware.name)

    def _tiers(self) -> list[Tier]:
        return [
            Tier("GPU", None, 0.0),
            Tier("host memory", self.host_gb_s, 20e-6),
            Tier("disk", self.disk_gb_s, 200e-6),
            Tier("network", self.network_gb_s, 1e-3),
        ]

    def _plan_layout(self, inputs: PredictionInputs) -> Layout:
        chosen = inputs.setup.hardware
        layout = self._layout(self.plan_model, chosen if chosen.gpu else self._smallest_that_fits(self.plan_model))
        if not layout.fits:
            raise ConfigError(
                f"{self.plan_model} does not fit hardware={chosen.name}. Choose a larger layout, or another "
                "scenario.plan_model."
            )
        return layout

    def _of(self, cell: PublishedRow) -> Hardware:
        return published_rules.hardware_card(cell.hardware) or self._smallest_that_fits(cell.model)

    def _smallest_that_fits(self, model: str) -> Hardware:
        cards = [self._card(name) for name in self.not_stated]
        for card in cards:
            if self._layout(model, card).fits:
                return card
        raise ConfigError(
            f"{model} does not fit {', '.join(self.not_stated)}. Add a larger layout to scenario.not_stated."
        )

    def _layout(self, model: str, card: Hardware, dtype: str = published_rules.PUBLISHED_DTYPE) -> Layout:
        return Layout(shape_of(model.lower()), card, dtype, self.host_gb_s, self.network_gb_s)

    def _card(self, name: str) -> Hardware:
        path = layout.CARDS / f"{name}.yaml"
        card = layout.read_card(path) if path.is_file() else None
        if card is None or card.gpu is None:
            raise ConfigError(
                f"A prediction needs peak rates, and the hardware {name!r} has none. For scenario.fit_from choose runs "
                "on a layout of conf/hardware with a GPU: h100, h800x2, …"
            )
        return card


@cache
def shape_of(name: str) -> DenseShape:
    return DenseShape.of(loading.shape_config(name))  # cached: it takes tenths of a second


def _error_pct(predicted: float, published: float) -> float:
    return 100 * (predicted / published - 1)


def _distribution(errors_pct: Sequence[float]) -> dict[str, Any]:
    """The fields of `_Errors`."""
    sizes = sorted(abs(error) for error in errors_pct)
    return {
        "figures_compared": len(sizes),
        "median_error_pct": median(errors_pct),
        "median_size_pct": median(sizes),
        "p90_size_pct": quantiles(sizes, n=10)[-1] if len(sizes) > 1 else sizes[0],
        "largest_size_pct": sizes[-1],
        "within_15_pct": 100 * sum(size <= 15 for size in sizes) / len(sizes),
        "within_30_pct": 100 * sum(size <= 30 for size in sizes) / len(sizes),
    }


def _row(payload: Payload | None, model: str, layout: str, **fields: Any) -> Row:
    """A row without an engine. Its `scenario` is the payload's name, unless `fields` has another one."""
    shared: dict[str, Any] = {
        "scenario": payload.name if payload else "",
        "weights": "none",
        "dtype": published_rules.PUBLISHED_DTYPE,
        "backend": PREDICTED,
        "attention": "",
        "merge": "",
        "tier": "",
        "arm": "",
        "context_tokens": 0,
        "query_tokens": 0,
    }
    return Row(model=model, hardware=layout, payload=payload, **(shared | fields))
