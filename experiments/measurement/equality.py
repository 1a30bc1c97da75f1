"""Compares the answers of the direct and the injected arm, and grades their equality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from experiments.measurement.reference import ReferenceLogits, max_abs_diff

Grade = Literal["bitwise", "tokens", "near_tie", "drifted", "diverged"]
GRADES: tuple[Grade, ...] = get_args(Grade)
"""From best to worst. The last two fail where the injection is exact."""
NOISE_MULTIPLE = 4.0
"""Honest answers were at most 1.5 times the reference's noise away from it (SmolLM2-135M and random weights, fp32 and
bf16, 288 to 825 tokens)."""
LEAST_UNITS = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""The noise counts as at least so many units in the last place of the largest logit, because executions can agree by
chance. Honest answers of a tiny model with latent attention were 8 units off in fp32, where three executions of its
forward pass differed by one."""
MOST_UNITS = {torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 16.0}
"""The noise counts as at most so many units in the last place of the largest logit. Measured: 7 in fp32, 2 in bf16."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A greedy answer: its token ids, and their logits of shape (steps, vocab).

    Raises ValueError if a token does not have the largest logit of its step, because margins are defined for greedy
    answers only. NaN logits fail the same check.
    """

    token_ids: tuple[int, ...]
    logits_SV: torch.Tensor
    complete: bool = True
    """False if only the largest log-probabilities are known. All others are -inf, and the best grade is `tokens`."""

    def __post_init__(self) -> None:
        if not self.token_ids or self.logits_SV.ndim != 2 or len(self.token_ids) != self.logits_SV.shape[0]:
            raise ValueError(
                "An answer has at least one token, and logits of shape (tokens, vocab). This one has "
                f"{len(self.token_ids)} tokens and logits of shape {tuple(self.logits_SV.shape)}."
            )
        chosen_S = self.logits_SV.gather(1, torch.tensor(self.token_ids, device=self.logits_SV.device)[:, None])[:, 0]
        off = (chosen_S != self.logits_SV.amax(dim=1)).nonzero()
        if len(off):
            step = int(off[0])
            raise ValueError(
                f"Token {self.token_ids[step]} of step {step} does not have the largest logit: not a greedy answer."
            )


@dataclass(frozen=True)
class Equality:
    """The comparison of two greedy answers. Differences are those of logits.

    `logit_max_abs_diff` and the distances from the reference are taken over the steps up to and including the first
    token that differs: until there both arms have received the same tokens, and after it the logits belong to different
    texts. `near_tie_margin` is measured only where a token differs: how far the direct arm's logit of its own token
    leads that of the other arm's token.
    """

    grade: Grade
    first_difference: int | None
    """The first step with different tokens; None if all tokens are equal."""
    logit_max_abs_diff: float
    rounding_noise: float
    """The largest difference between two executions of the reference, which shares no code with the engine."""
    tolerance: float
    """What rounding is taken to explain: `NOISE_MULTIPLE` times the noise, which is bounded by dtype on both sides."""
    direct_off_reference: float
    injected_off_reference: float
    near_tie_margin: float | None = None

    @property
    def direct_is_sound(self) -> bool:
        """Whether the direct arm computes what the reference computes, up to rounding."""
        return self.direct_off_reference <= self.tolerance


def grade(
    direct: Trace, injected: Trace, reference: Callable[[int | None], ReferenceLogits], dtype: torch.dtype
) -> Equality:
    """Compares two greedy answers to the same prompt, with each other and with an independent forward pass.

    bitwise    the logits of every step are equal to the bit, and within the tolerance of the reference
    tokens     every token is equal, and every logit is within the tolerance of the other arm's and of the reference's
    near_tie   a token differs, and every logit up to there is within the tolerance: rounding alone turned a near tie
    drifted    every token is equal, and a logit is beyond the tolerance: something other than rounding moved it
    diverged   a token differs, and a logit is beyond the tolerance

    reference: called once with the first step that differs, or None; gives the logits that belong to the direct arm's
    answer. dtype: of the model's weights; it bounds the noise from both sides.
    """
    steps = min(len(direct.token_ids), len(injected.token_ids))
    differing = (step for step in range(steps) if direct.token_ids[step] != injected.token_ids[step])
    step = next(differing, None)
    if step is None and len(direct.token_ids) != len(injected.token_ids):
        raise ValueError(
            f"One answer ends after {steps} equal tokens and the other goes on: trace both for "
            "as many steps, or keep the end token in the trace."
        )
    shared = steps if step is None else step + 1
    judge = reference(step)
    noise, allowed = judge.noise, tolerance(judge, dtype)
    apart = max_abs_diff(direct.logits_SV[:shared], injected.logits_SV[:shared])
    direct_off, injected_off = (_off(trace, judge, shared) for trace in (direct, injected))
    within = max(apart, injected_off) <= allowed
    if step is None:
        same = direct.complete and injected.complete and _same_bits(direct.logits_SV, injected.logits_SV)
        found: Grade = "drifted" if not within else "bitwise" if same else "tokens"
        return Equality(found, None, apart, noise, allowed, direct_off, injected_off)
    logits_V = direct.logits_SV[step].double()
    margin = float(logits_V[direct.token_ids[step]] - logits_V[injected.token_ids[step]])
    # Logits that an engine does not report can't be compared, but a reported margin beyond both tolerances can.
    tie = within and margin <= 2 * allowed
    return Equality("near_tie" if tie else "diverged", step, apart, noise, allowed, direct_off, injected_off, margin)


def tolerance(reference: ReferenceLogits, dtype: torch.dtype) -> float:
    """The largest difference of a logit that rounding is taken to explain.

    It is `NOISE_MULTIPLE` times the reference's noise. The noise counts as at least `LEAST_UNITS` in the last place of
    the largest logit, and as at most `MOST_UNITS`.
    """
    first_SV = reference.runs[0]
    unit = torch.finfo(dtype).eps * float(first_SV[first_SV.isfinite()].abs().max())
    return NOISE_MULTIPLE * min(max(reference.noise, LEAST_UNITS[dtype] * unit), MOST_UNITS[dtype] * unit)


def summary(grades: Iterable[str]) -> dict[Grade, int]:
    """The number of answers with each grade, from best to worst. Raises ValueError for an unknown grade."""
    counts = Counter(grades)
    unknown = counts.keys() - set(GRADES)
    if unknown:
        raise ValueError(f"No such grade: {', '.join(sorted(unknown))}. Grades: {', '.join(GRADES)}.")
    return {name: counts[name] for name in GRADES}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares bytes, because torch.equal treats 0.0 and -0.0 as equal."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _off(trace: Trace, reference: ReferenceLogits, shared: int) -> float:
    """The largest distance of the trace's logits from the reference's, over the steps that both have."""
    rows = [row for row, step in enumerate(reference.steps) if step < shared]
    steps = [reference.steps[row] for row in rows]
    return max_abs_diff(trace.logits_SV[steps], reference.runs[0][rows])
