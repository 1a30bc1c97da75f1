"""The grades: each one reached, and the boundary between a near tie and a divergence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.measurement.equality import GRADES, Trace, grade, summary


def never(step: int) -> float:
    raise AssertionError("the rounding noise was measured where no token differs")


def greedy(logits_SV: torch.Tensor) -> Trace:
    return Trace(tuple(logits_SV.argmax(dim=1).tolist()), logits_SV)


def answer(*steps: list[float], dtype: torch.dtype = torch.float32) -> Trace:
    return greedy(torch.tensor(steps, dtype=dtype))


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 99))
def test_an_answer_is_bitwise_equal_to_its_copy(steps: int, vocab: int, seed: int) -> None:
    logits_SV = torch.randn(steps, vocab, generator=torch.Generator().manual_seed(seed))
    equality = grade(greedy(logits_SV), greedy(logits_SV.clone()), never)
    assert (equality.grade, equality.first_difference, equality.logit_max_abs_diff) == ("bitwise", None, 0.0)


@pytest.mark.parametrize("other", [answer([1.0, 0.5], [2.0, 0.25]), answer([1.0, 0.0], [2.0, 0.0])])
def test_equal_tokens_with_other_logits(other: Trace) -> None:
    equality = grade(answer([1.0, 0.0], [2.0, -0.0]), other, never)
    assert equality.grade == "tokens"  # the second has -0.0, whose bits are not those of 0.0
    assert equality.logit_max_abs_diff == max(
        0.0, float((other.logits_SV - torch.tensor([[1, 0], [2, 0]])).abs().max())
    )


def test_equal_values_of_another_dtype_are_not_graded_bitwise() -> None:
    assert grade(answer([1.0, 0.0]), answer([1.0, 0.0], dtype=torch.bfloat16), never).grade == "tokens"


@pytest.mark.parametrize(("noise", "expected"), [(0.25, "near_tie"), (0.24, "diverged"), (0.0, "diverged")])
def test_a_near_tie_is_within_twice_the_noise_of_the_direct_arm(noise: float, expected: str) -> None:
    checked: list[int] = []

    def rounding_noise(step: int) -> float:
        checked.append(step)
        return noise

    direct = answer([0.0, 9.0, 0.0], [1.0, 0.5, 0.0], [9.0, 0.0, 0.0])
    injected = answer([0.0, 9.0, 0.0], [0.75, 1.5, 0.0], [-90.0, 0.0, 0.0])
    equality = grade(direct, injected, rounding_noise)
    assert (equality.grade, equality.first_difference, equality.near_tie_margin) == (expected, 1, 0.5)
    assert equality.rounding_noise == noise
    assert equality.logit_max_abs_diff == 1.0  # step 2 follows a different token, and does not count
    assert checked == [1]


@given(st.integers(0, 999), st.floats(1e-3, 1.0))
def test_a_change_of_each_logit_within_the_noise_never_diverges(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    direct_SV = torch.randn(4, 6, dtype=torch.float64, generator=generator) * noise
    moved_SV = direct_SV + (2 * torch.rand(4, 6, dtype=torch.float64, generator=generator) - 1) * noise
    assert grade(greedy(direct_SV), greedy(moved_SV), lambda step: noise).grade != "diverged"


def test_a_trace_that_is_not_greedy_is_refused() -> None:
    with pytest.raises(ValueError, match="Token 1 of step 1 does not have the largest logit"):
        Trace((0, 1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="not a greedy answer"):
        Trace((0,), torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(ValueError, match=r"1 tokens and logits of shape \(2, 2\)"):
        Trace((0,), torch.eye(2))


def test_an_answer_that_ends_early_is_refused() -> None:
    with pytest.raises(ValueError, match="ends after 1 equal tokens"):
        grade(answer([1.0, 0.0]), answer([1.0, 0.0], [1.0, 0.0]), never)


def test_the_summary_counts_every_grade_from_best_to_worst() -> None:
    counts = summary(["tokens", "bitwise", "tokens"])
    assert list(counts.items()) == [("bitwise", 1), ("tokens", 2), ("near_tie", 0), ("diverged", 0)]
    assert tuple(counts) == GRADES
    with pytest.raises(ValueError, match="No such grade: token"):
        summary(["token"])
