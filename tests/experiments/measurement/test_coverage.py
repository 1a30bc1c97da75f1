"""How often an interval holds the true ratio, by simulation; bounds that a wrong interval does not meet."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from experiments.measurement.coverage import LEAST, MOST, NOISES, PAIRS, coverage, main
from experiments.measurement.statistics import COVERAGE, median_interval, median_intervals

Array = npt.NDArray[np.float64]
REPETITIONS = 1500
LOOSE = 0.02
"""Three standard errors of a coverage of 97% at 1,500 repetitions are 1.3%."""
BY_KIND = {noise.kind: noise for noise in NOISES}


def range_of_three(ratios_RN: Array) -> tuple[Array, Array]:
    """Holds the median with 75%."""
    return ratios_RN[:, :3].min(axis=1), ratios_RN[:, :3].max(axis=1)


def bootstrap(ratios_RN: Array) -> tuple[Array, Array]:
    """The 95% percentile bootstrap of the median, which supposes that the values are independent."""
    rng = np.random.default_rng(0)
    pairs = ratios_RN.shape[1]
    ends = [
        np.percentile(np.median(row_N[rng.integers(0, pairs, (200, pairs))], axis=1), [2.5, 97.5])
        for row_N in ratios_RN
    ]
    low_R, high_R = np.asarray(ends).T
    return low_R, high_R


def holds(noise: str, pairs: int, intervals: object = median_intervals) -> bool:
    assert callable(intervals)
    share = coverage(BY_KIND[noise], pairs, REPETITIONS, seed=1, intervals=intervals)
    return LEAST - LOOSE <= share <= MOST + LOOSE


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("noise", [noise.kind for noise in NOISES if not noise.why])
def test_an_interval_holds_the_true_ratio_as_often_as_it_says(noise: str, pairs: int) -> None:
    assert holds(noise, pairs)


def test_thirty_pairs_hold_under_noise_that_neighbours_share() -> None:
    assert holds("correlated, own", 30)


def test_the_bounds_notice_an_interval_of_three_pairs() -> None:
    assert not holds("independent", 6, range_of_three)


def test_the_bounds_notice_a_bootstrap_under_correlated_noise() -> None:
    assert not holds("correlated, own", 30, bootstrap)


def test_a_drift_of_one_arm_alone_is_known_to_be_missed() -> None:
    assert BY_KIND["own drift"].why
    assert coverage(BY_KIND["own drift"], 30, REPETITIONS) < LEAST - LOOSE


def test_independent_noise_is_covered_by_what_the_tables_say() -> None:
    assert coverage(BY_KIND["independent"], 6, 20_000) == pytest.approx(COVERAGE, abs=0.005)


def test_one_run_and_many_have_the_same_intervals() -> None:
    values_RN = np.random.default_rng(2).lognormal(size=(5, 17))
    low_R, high_R = median_intervals(values_RN)
    assert [median_interval(row_N.tolist()) for row_N in values_RN] == list(zip(low_R, high_R, strict=True))


def test_the_table_names_every_noise_and_explains_what_is_outside(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repetitions", "4000"]) == 0
    shown = capsys.readouterr().out
    assert "96.9%" in shown
    for noise in NOISES:
        assert noise.kind in shown
    assert "cannot be told from an effect" in shown
