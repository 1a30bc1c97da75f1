"""Arrivals of a load: drawn from a seed, or read from a trace file, and stretched to any rate."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.traces import NO_MEMORY, ArrivalPlan, read_arrivals
from kvmem.errors import ConfigError


def test_a_plan_has_the_same_requests_at_every_rate() -> None:
    plan = ArrivalPlan(seed=3, memories=5, zipf_exponent=1.0, requests=2000, plain_share=0.25)
    slow, fast = plan.draw(10.0), plan.draw(40.0)
    assert slow[1] == fast[1] and np.allclose(slow[0], 4 * np.array(fast[0]))
    assert slow[0][-1] == pytest.approx(200, rel=0.1)
    assert slow[1].count(NO_MEMORY) == pytest.approx(500, rel=0.1) and slow[1].count(0) > slow[1].count(4) > 0
    without = ArrivalPlan(seed=3, memories=5, zipf_exponent=1.0, requests=2000)
    assert [one for one in without.draw(10.0)[1] if one == NO_MEMORY] == [] and without.draw(10.0)[0] == slow[0]


def test_a_trace_gives_its_bursts_and_its_memories(tmp_path: Path) -> None:
    lines = [
        {"timestamp": at, "memory": name, "hash_ids": [1]} for at, name in zip((0, 0, 30, 40), "abba", strict=True)
    ]
    path = tmp_path / "trace.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, lines)))
    gaps, used = read_arrivals(path, 3, 2)
    assert used == [1, 0, 0], "the most frequent name is memory 0"
    plan = ArrivalPlan(seed=0, memories=2, zipf_exponent=1.0, requests=3, gaps=gaps, used=used)
    assert plan.draw(0.5) == ([0.0, pytest.approx(4.5), pytest.approx(6.0)], [1, 0, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"timestamp": 0}\n{"timestamp": 5}', "has 2 arrivals, and scenario.requests=2 needs one more"),
        ('{"timestamp": 0}\n{"at": 5}', "line 2: KeyError('timestamp')"),
        ('{"timestamp": 5}\n{"timestamp": 0}\n{"timestamp": 9}', "line 2: its timestamp is before"),
        ('{"timestamp": 0, "memory": 1}\n{"timestamp": 5}\n{"timestamp": 9}', "some lines have a memory"),
    ],
)
def test_a_wrong_trace_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_arrivals(path, 2, 4)
    assert message in str(raised.value)
