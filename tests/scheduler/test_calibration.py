"""Costs of prefills: kept for the next scheduler, corrected by what is seen, and recovered from a disturbed start.

Clocks are counted: a prefill takes a millisecond for each token that enters the model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvmem.cache.model_function import observing
from kvmem.engines.huggingface import backend as hf
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import KVMemWarning
from kvmem.scheduler import calibration
from kvmem.scheduler.calibration import Calibration, CalibrationFile, validity
from kvmem.scheduler.cost_model import CALIBRATION_TOKENS, Costs
from kvmem.scheduler.scheduler import MemScheduler
from kvmem.tiers import LoadTimes
from tests.helpers.tiny import memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on

TRUE = Costs(0.01, 1e-3, 1e-7, 64)
WRONG = [(tokens, 0, 4.0) for tokens in CALIBRATION_TOKENS]
"""A measurement during which something else ran: an empty prompt takes 4 s, and a token nothing."""


def seen(count: int, seed: int = 0) -> list[tuple[int, int, float]]:
    """Prefills with 20% noise, and each tenth one 30 times as slow."""
    chance = np.random.default_rng(seed)
    new, behind = chance.integers(20, 600, count).tolist(), chance.choice([0, 300], count).tolist()
    noise = chance.uniform(0.8, 1.2, count) * np.where(np.arange(count) % 10 == 9, 30, 1)
    return [(n, b, float(TRUE.prefill_s(n, b) * f)) for n, b, f in zip(new, behind, noise, strict=True)]


def test_a_disturbed_measurement_is_outvoted_and_outliers_move_little() -> None:
    wrong = Calibration(WRONG, 64)
    assert wrong.costs.saved_s(500, 20.0) < 0.1
    for sample in seen(40):
        wrong.prefilled(*sample)
    assert wrong.costs.saved_s(500, 20.0) == pytest.approx(float(TRUE.saved_s(500, 20.0)), rel=0.1)
    assert wrong.costs.prefill_s(20, 300) == pytest.approx(TRUE.prefill_s(20, 300), rel=0.2)


def test_a_measurement_of_an_idle_machine_is_outvoted_by_a_busy_one() -> None:
    """Its errors are small in seconds, so its weight has to fall with each prefill that is seen."""
    idle = Calibration([(tokens, 0, float(TRUE.prefill_s(tokens)) / 10) for tokens in CALIBRATION_TOKENS], 64)
    for new, behind in [(20, 0), (100, 300), (300, 0), (20, 300)] * 4:
        idle.prefilled(new, behind, float(TRUE.prefill_s(new, behind)))
    assert idle.costs.saved_s(500, 20.0) == pytest.approx(float(TRUE.saved_s(500, 20.0)), rel=0.1)


def test_prefills_of_one_length_leave_the_rest_to_the_first_measurement() -> None:
    first = [(tokens, 0, float(TRUE.prefill_s(tokens))) for tokens in CALIBRATION_TOKENS]
    found = Calibration(first, 64)
    before = found.costs
    for _ in range(200):
        found.prefilled(100, 0, float(TRUE.prefill_s(100)))
    for tokens in (20, 100, 1000):
        assert found.costs.prefill_s(tokens) == pytest.approx(before.prefill_s(tokens), rel=0.02)
    assert found.seen == 200 and len(found.recent) == calibration.RECENT


@pytest.fixture
def counted(qwen3: HFBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The engine's clock shows the tokens so far, in milliseconds. `passes`: how many forward passes there were."""
    clock = SimpleNamespace(tokens=0, passes=0)

    @observing
    def count(_: object, inputs: tuple[object, ...]) -> None:
        clock.tokens += inputs[0].numel()  # type: ignore[attr-defined]
        clock.passes += 1

    monkeypatch.setattr(hf, "time", SimpleNamespace(perf_counter=lambda: clock.tokens / 1000))
    hook = qwen3.model.get_input_embeddings().register_forward_pre_hook(count)
    yield clock
    hook.remove()


def opened(backend: HFBackend, folder: Path | None) -> MemScheduler:
    budget = {"ram": 1 << 30} if folder is None else {"ram": 1 << 30, "disk": 1 << 30}
    return MemScheduler(memory_on(backend), "benefit_per_byte", budget, folder)


def test_a_planted_wrong_calibration_recovers_and_the_memories_are_kept(
    qwen3: HFBackend, counted: SimpleNamespace, tmp_path: Path
) -> None:
    CalibrationFile(tmp_path, validity(qwen3)).write(Calibration(WRONG, 64), LoadTimes(), LoadTimes())
    with opened(qwen3, tmp_path) as scheduler:
        assert counted.passes == 0, "it was kept, so nothing is measured"
        cached = []
        for i in range(16):
            answer = scheduler.answer(QUERY, MEMORIES[i % 3], 4)
            assert answer.token_ids == as_text(qwen3, MEMORIES[i % 3], 4)
            cached.append(answer.cached_tokens)
            scheduler.tick()
        assert cached[:3] == [0, 0, 0] and min(cached[-6:]) > 50
        assert scheduler.index.tiers().keys() == {"m0", "m1", "m2"}
        assert scheduler.loads.costs.saved_s(100, 10.0) == pytest.approx(0.1, rel=0.1)
    passes = counted.passes
    with opened(qwen3, tmp_path) as again:
        assert counted.passes == passes
        assert again.loads.costs.saved_s(100, 10.0) == pytest.approx(0.1, rel=0.1)


def test_a_calibration_is_told_measured_once_and_kept_for_what_it_is_valid_for(
    qwen3: HFBackend, counted: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, calibration.__name__), opened(qwen3, tmp_path) as scheduler:
        scheduler.answer(QUERY, MEMORIES[0], 1)
        scheduler.items.loads.record("disk", 1000, 0.5)
    told = [record.getMessage().split(":")[0] for record in caplog.records]
    assert told[0] == "Calibrating" and told[1].startswith("Calibrated in")
    with opened(qwen3, tmp_path) as again:
        assert again.items.loads.expected_s("disk", 1000) == 0.5
    kept = json.loads((tmp_path / calibration.FILE_NAME).read_text())["valid_for"]
    assert list(kept) == [validity(qwen3)]
    for part in ("engine huggingface", "model ", "dtype torch.float32", "device cpu", "threads ", "torch "):
        assert part in validity(qwen3)
    other = CalibrationFile(tmp_path, "another machine")
    assert other.saved is None
    other.write(Calibration(WRONG, 64), LoadTimes(), LoadTimes())
    assert CalibrationFile(tmp_path, validity(qwen3)).saved is not None, "it keeps what is not its own"


@pytest.mark.parametrize("damage", ["{", '{"version": 1}', '{"version": 9, "valid_for": {}}', "entry"])
def test_a_damaged_calibration_is_told_and_measured_again(tmp_path: Path, damage: str) -> None:
    content = (
        json.dumps({"version": 1, "valid_for": {"here": {"first": [[0, 0, -1.0]]}}}) if damage == "entry" else damage
    )
    (tmp_path / calibration.FILE_NAME).write_text(content)
    with pytest.warns(KVMemWarning, match=r"calibration\.json can't be used: .* measured again"):
        file = CalibrationFile(tmp_path, "here")
    assert file.saved is None
    file.write(Calibration(WRONG, 64), LoadTimes(), LoadTimes())
    again = CalibrationFile(tmp_path, "here")
    assert again.saved is not None and again.saved.first == WRONG


def test_a_folder_that_takes_no_calibration_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / calibration.FILE_NAME / "taken").mkdir(parents=True)
    with pytest.warns(KVMemWarning, match="can't be used"):
        file = CalibrationFile(tmp_path, "here")
    file.write(Calibration(WRONG, 64), LoadTimes(), LoadTimes())
    assert "The calibration was not written" in caplog.text


def test_given_costs_stay_as_given(qwen3: HFBackend, tmp_path: Path) -> None:
    with scheduler_on(qwen3, tmp_path) as scheduler:
        before = scheduler.loads.costs
        for _ in range(6):
            scheduler.answer(QUERY, MEMORIES[0], 1)
        scheduler.tick()
        assert scheduler.loads.costs is before
    assert not (tmp_path / calibration.FILE_NAME).exists()
