"""The grades: each one reached, and the boundary between a near tie and a divergence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.measurement.equality import GRADES, Equality, Trace, grade, summary
from experiments.measurement.reference import ReferenceLogits


def greedy(logits_SV: torch.Tensor) -> Trace:
    return Trace(tuple(logits_SV.argmax(dim=1).tolist()), logits_SV)


def answer(*steps: list[float], dtype: torch.dtype = torch.float32) -> Trace:
    return greedy(torch.tensor(steps, dtype=dtype))


def judged_by(*runs_SV: torch.Tensor) -> Callable[[int | None], ReferenceLogits]:
    """A reference of these executions, for every step."""
    return lambda at: ReferenceLogits(tuple(run_SV.float() for run_SV in runs_SV), tuple(range(len(runs_SV[0]))))


def graded(direct: Trace, injected: Trace, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> Equality:
    """The grade beside a reference that agrees with the direct arm, and whose executions are `noise` apart."""
    return grade(direct, injected, judged_by(direct.logits_SV, direct.logits_SV + noise), dtype)


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 99))
def test_an_answer_is_bitwise_equal_to_its_copy(steps: int, vocab: int, seed: int) -> None:
    logits_SV = torch.randn(steps, vocab, generator=torch.Generator().manual_seed(seed))
    equality = graded(greedy(logits_SV), greedy(logits_SV.clone()))
    assert (equality.grade, equality.first_difference, equality.logit_max_abs_diff) == ("bitwise", None, 0.0)


def test_other_bits_within_the_tolerance_are_equal_tokens() -> None:
    direct = answer([1.0, 0.0], [2.0, -0.0])
    assert graded(direct, answer([1.0, 0.0], [2.0, 0.0])).grade == "tokens"  # the bits of 0.0 and -0.0 differ
    moved = graded(direct, answer([1.0, 0.0], [2.0, 1e-3]), noise=5e-5, dtype=torch.bfloat16)
    assert (moved.grade, round(moved.logit_max_abs_diff, 6)) == ("tokens", 1e-3)


def test_equal_values_of_another_dtype_are_not_graded_bitwise() -> None:
    assert graded(answer([1.0, 0.0]), answer([1.0, 0.0], dtype=torch.bfloat16)).grade == "tokens"


@pytest.mark.parametrize(("apart", "expected"), [(1.9e-5, "tokens"), (2.1e-5, "drifted")])
def test_equal_tokens_beyond_four_times_the_noise_have_drifted(apart: float, expected: str) -> None:
    equality = graded(answer([1.0, 0.0]), answer([1.0, apart]), noise=5e-6)
    assert equality.grade == expected
    assert equality.tolerance == pytest.approx(2e-5, rel=0.05)


@pytest.mark.parametrize(("moved", "expected"), [(3e-5, "near_tie"), (3e-3, "diverged")])
def test_a_token_that_differs_is_a_near_tie_only_within_the_tolerance(moved: float, expected: str) -> None:
    direct = answer([0.0, 9.0], [1.0, 1.0 - 1e-5], [9.0, 0.0])
    injected = answer([0.0, 9.0], [1.0 - moved, 1.0 - 1e-5], [0.0, 90.0])
    equality = graded(direct, injected, noise=1e-5)
    assert (equality.grade, equality.first_difference) == (expected, 1)
    assert equality.near_tie_margin == pytest.approx(1e-5, rel=0.1)
    assert equality.logit_max_abs_diff == pytest.approx(moved, rel=0.1)  # step 2 follows a different token


@pytest.mark.parametrize(("noise", "most"), [(0.0, 4 * 4 * 2**-23), (1.0, 4 * 64 * 2**-23)])
def test_the_noise_is_bounded_from_both_sides(noise: float, most: float) -> None:
    """Two executions that agree by chance forbid nothing, and a reference gone wrong excuses nothing."""
    assert graded(answer([1.0, 0.0]), answer([1.0, 0.0]), noise).tolerance == pytest.approx(most)


def test_both_arms_alike_and_both_wrong_is_noticed() -> None:
    wrong = answer([1.0, 0.5])
    equality = grade(wrong, wrong, judged_by(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-6]])), torch.float32)
    assert equality.grade == "drifted" and not equality.direct_is_sound
    assert equality.direct_off_reference == 0.5


@given(st.integers(0, 999), st.floats(1e-3, 0.02))
def test_a_change_of_each_logit_within_the_noise_never_diverges(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    direct_SV = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    moved_SV = direct_SV + (2 * torch.rand(4, 6, dtype=torch.float64, generator=generator) - 1) * noise
    equality = grade(greedy(direct_SV), greedy(moved_SV), judged_by(direct_SV, direct_SV + noise), torch.bfloat16)
    assert equality.grade not in ("drifted", "diverged")


def test_a_trace_that_is_not_greedy_is_refused() -> None:
    with pytest.raises(ValueError, match="Token 1 of step 1 does not have the largest logit"):
        Trace((0, 1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="not a greedy answer"):
        Trace((0,), torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(ValueError, match=r"1 tokens and logits of shape \(2, 2\)"):
        Trace((0,), torch.eye(2))


def test_an_answer_that_ends_early_is_refused() -> None:
    with pytest.raises(ValueError, match="ends after 1 equal tokens"):
        graded(answer([1.0, 0.0]), answer([1.0, 0.0], [1.0, 0.0]))


def test_the_summary_counts_every_grade_from_best_to_worst() -> None:
    counts = summary(["tokens", "bitwise", "tokens"])
    assert list(counts.items()) == [("bitwise", 1), ("tokens", 2), ("near_tie", 0), ("drifted", 0), ("diverged", 0)]
    assert tuple(counts) == GRADES
    with pytest.raises(ValueError, match="No such grade: token"):
        summary(["token"])
