"""Every injection method, in one run: the fields of its rows, and their plot."""

from __future__ import annotations

import pytest

from experiments.baselines.base import recipes
from experiments.bench import injection_methods
from experiments.bench.bench import Bench
from experiments.config import compose
from experiments.measurement.equality import grade
from experiments.reporting import plots, tables
from experiments.results import arms
from experiments.scenarios.injection_cost import DecodingPayload, InjectionCostPayload
from kvmem.errors import ConfigError
from tests.helpers.tiny import copy_of, same_bits

TINY = [
    "model=tiny",
    "model.weights=random",
    "scenario=injection_cost",
    "scenario.pairs=6",
    "scenario.answer_tokens=6",
    "scenario.decode_tokens=8",
    "workload=python_docs",
    "workload.context_tokens=[64,128]",
    "workload.query_tokens=[24]",
    "hardware.check=false",
    "sink=none",
]


@pytest.fixture(scope="module")
def bench():
    return Bench.open(compose.validate(compose.compose([*TINY, "backend=hf_graph"])))


def test_rows_of_a_cell(bench):
    cells = bench.setup.scenario.cells(bench)
    rows = [row for cell in cells for row in bench.setup.scenario.measure(bench, cell)]
    of_methods = [row for row in rows if row.scenario == "injection_cost"]
    assert [row.context_tokens for row in rows if row.scenario == DecodingPayload.name] == [128]
    assert len(of_methods) == 2 * (4 + len(recipes()))
    for row in of_methods:
        figures = row.payload
        assert isinstance(figures, InjectionCostPayload)
        assert figures.over_limit == pytest.approx(figures.ttft_s / figures.limit_s)
        assert figures.ttft_low_s <= figures.ttft_s <= figures.ttft_high_s
        injects = row.arm not in (arms.DIRECT, arms.DIRECT_EAGER, arms.ALONE)
        assert (row.equality in ("bitwise", "tokens", "near_tie")) == injects
        assert (figures.cached_tokens == row.context_tokens) == injects
        assert row.arm != arms.IN_PLACE or figures.over_fastest == 1.0
    (fastest,) = [row for row in of_methods if row.arm == arms.IN_PLACE and row.context_tokens == 128]
    assert fastest.payload.place_s > 0 and fastest.payload.over_query_alone_s is not None
    assert fastest.conditions["left_out"] == "CUDA graphs, compiled layers, fused kernels"
    titles = [table.title for table in tables.tables(rows)]
    assert titles == ["injection_cost", DecodingPayload.name]
    assert "over_limit" in plots.draw(rows)


def test_every_method_gives_the_same_answer_and_leaves_the_memory_unchanged(bench):
    (cell, *_) = bench.setup.scenario.cells(bench)
    item = bench.memory.extract(cell.cell.memories[0])
    before = copy_of(item)
    question, tokens = cell.cell.question, item.metadata.tokens
    prompts = {question: bench.backend.template.split(tokens, question)}
    methods = injection_methods.injection_methods(bench.backend, item, prompts)
    assert {"memos", "deepcopy", "shared tensors", arms.DIRECT, arms.IN_PLACE} <= methods.keys()
    direct = methods[arms.DIRECT].trace(6)
    for name, method in methods.items():
        for _ in range(2):  # the second answer finds the memory unchanged
            token = method.first_token(question).token
            assert name == arms.ALONE or token.id == direct.token_ids[0]
        if method.trace is not None:
            equality = grade(
                direct,
                method.trace(6),
                lambda step: bench.reference.logits(prompts[question].ids, direct.token_ids, step),
                bench.backend.dtype,
            )
            assert equality.grade in ("bitwise", "tokens") and equality.direct_is_sound, name
    assert same_bits(item, before)


def test_conditions_report_the_cost_of_warming_up_so_far(bench):
    warm_up = bench.backend.engine.warm_up
    before = bench.conditions_now()["warm_up"]["seconds"]
    warm_up.seconds += 1.5
    assert bench.conditions_now()["warm_up"]["seconds"] == before + 1.5


def test_an_engine_other_than_hf_graph_is_refused_before_it_loads():
    other = compose.validate(compose.compose(TINY))
    with pytest.raises(ConfigError, match="Use backend=hf_graph"):
        other.scenario.check(other)
