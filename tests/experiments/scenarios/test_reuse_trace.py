"""The reuse_trace scenario at a tiny size: the replay agrees with the simulation, and a user's own trace is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.bench.bench import Bench
from experiments.config import compose
from experiments.reporting import plots, tables
from experiments.scenarios.reuse_trace import ReuseTrace, behind, compared_figures, disagreement, ratio_of_sums
from experiments.traces import jsonl
from experiments.traces.base import Event
from experiments.traces.simulator import Outcome
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ConfigError
from kvmem.scheduler.policies.base import policy_classes

TINY = [
    "model=tiny",
    "model.weights=random",
    "scenario=reuse_trace",
    "hardware.check=false",
    "scenario.memories=20",
    "scenario.uses=120",
    "scenario.budget_shares=[0.1,0.5]",
    "scenario.replay_memories=5",
    "scenario.replay_uses=40",
]


@pytest.fixture(scope="module")
def on() -> Bench:
    return Bench.open(compose.validate(compose.compose(TINY)))


def test_the_replay_agrees_with_the_simulator_and_every_policy_has_a_row(on: Bench) -> None:
    scenario = on.setup.scenario
    assert isinstance(scenario, ReuseTrace)
    cells = scenario.cells(on)
    assert len(cells) == 1 + 3 * 2
    replayed, simulated = scenario.measure(on, cells[0])
    assert replayed.verdict != "invalid" and replayed.equality in ("bitwise", "tokens"), replayed.verdict_reason
    assert replayed.pairs == sum(use.direct_s is not None for use in replayed.payload.uses)
    assert replayed.payload.hit_pct > 20 and replayed.payload.moved_bytes > 0
    assert any(move.kept_s for move in replayed.payload.moves)
    for name in ("hit_pct", "builds", "moved_bytes"):  # decisions; the times of a tiny model are mostly noise
        assert getattr(replayed.payload, name) == getattr(simulated.payload, name)
    assert len(replayed.payload.samples) > 40

    rows = [row for cell in cells[1:3] for row in scenario.measure(on, cell)]
    assert [row.arm for row in rows[: len(rows) // 2]] == [*sorted(set(policy_classes()) - {"oracle"}), "oracle"]
    for row in rows:
        assert row.payload.of_bound_pct <= 100 and len(row.payload.net_saved_all_s) == 3
        assert (row.payload.of_oracle_pct == 100) or row.arm != "oracle"
    assert "benefit_per_byte" in tables.markdown([replayed, simulated, *rows])
    assert "reuse" in plots.draw(rows)


def test_without_costs_nothing_is_simulated(on: Bench) -> None:
    scenario = ReuseTrace(memories=5, uses=10, seeds=1)
    with pytest.raises(ConfigError, match="the replay failed"):
        scenario.measure(on, scenario.cells(on)[1])


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean steady"):
        compose.validate(compose.compose(["scenario=reuse_trace", "scenario.replay_family=stedy"]))


def test_a_users_own_trace_is_read(qwen3: HFBackend, tmp_path: Path) -> None:
    lines = [
        {"memory": "faq", "text": "The shop opens at nine. The shop closes at six."},
        {"memory": "terms", "tokens": 300},
        {"memory": "faq", "kind": "edit"},
        {"memory": "faq", "query_tokens": 60},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    trace = jsonl.read(path, qwen3.template)
    faq_tokens = len(qwen3.template.memory_tokens(str(lines[0]["text"])).token_ids)
    assert trace.tokens == (faq_tokens, 300) and trace.uses == 3 and trace.query_tokens == round((40 + 40 + 60) / 3)
    assert trace.events == (Event("use", 0), Event("use", 1), Event("edit", 0), Event("use", 0))


@pytest.mark.parametrize(
    ("line", "error"),
    [("{", "line 2"), ('{"memory": "b", "tokns": 3}', "line 2"), ('{"memory": "b"}', "no line of 'b' has tokens")],
)
def test_an_invalid_trace_is_refused(qwen3: HFBackend, tmp_path: Path, line: str, error: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"memory": "a", "tokens": 9}\n' + line)
    with pytest.raises(ConfigError, match=error):
        jsonl.read(path, qwen3.template)
    with pytest.raises(ConfigError, match=r"scenario\.trace_file: there is no file"):
        jsonl.read(tmp_path / "other.jsonl", qwen3.template)


def test_figures_of_the_comparison() -> None:
    real = Outcome(np.array([1.0, 1.0]), 4.0, 2.0, 1, 10, 20, 1, 0)
    simulated = Outcome(np.array([1.0, 1.1]), 3.0, 2.0, 1, 10, 20, 1, 0)
    differs = disagreement(compared_figures(real), compared_figures(simulated))
    assert differs["the seconds saved"] == 0.25 and differs["the sum of TTFT"] == pytest.approx(0.05)
    ours, other = np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.5])
    remark = behind(ours, {"lfu": other, "lru": ours - 1, "tinylfu": ours + np.array([0.0, 1.0, 2.0])})
    assert remark == "behind lfu by 450 ms to 1.88 s a trace"  # 1.17 s ± 4.30 × 0.167
    share, interval = ratio_of_sums(ours, 2 * ours)
    assert share == 50 and interval == (50, 50)
    share, interval = ratio_of_sums(ours, np.array([2.0, 3.0, 7.0]))
    assert share == 50 and interval is not None and interval[0] < 40 and interval[1] > 60
