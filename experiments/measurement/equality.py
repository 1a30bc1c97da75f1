"""Compares the answers of the direct and the injected arm, and grades their equality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Grade = Literal["bitwise", "tokens", "near_tie", "diverged"]
GRADES: tuple[Grade, ...] = get_args(Grade)
"""From best to worst. Only the last one makes a row invalid."""


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
    """The comparison of two greedy answers."""

    grade: Grade
    first_difference: int | None
    """The first step with different tokens; None if all tokens are equal."""
    logit_max_abs_diff: float
    """The largest logit difference over the steps up to and including `first_difference`.

    Later logits belong to different texts, so they are not compared.
    """
    near_tie_margin: float | None = None
    """The difference between the direct arm's logits of the two tokens; None if all tokens are equal."""
    rounding_noise: float | None = None
    """The measured rounding noise of the logits at `first_difference`; None if all tokens are equal."""


def grade(direct: Trace, injected: Trace, rounding_noise: Callable[[int], float]) -> Equality:
    """Compares two greedy answers to the same prompt.

    bitwise    The logits of every step are equal to the bit.
    tokens     All tokens are equal.
    near_tie   Tokens differ, and rounding alone can explain the first difference.
    diverged   Tokens differ, and rounding alone can't explain the first difference.

    `rounding_noise(step)` returns the largest difference between the direct arm's own logits of that step, prefilled in
    different chunkings. The injected arm is not used, because a wrong cache would then count as rounding noise.

    In the direct arm, the logit of its own token exceeds that of the injected arm's token by a margin >= 0. Rounding
    can lower one logit and raise the other, each by the noise. So rounding can swap them only if margin <= 2 × noise.

    `rounding_noise` costs two prefills. It is called only if a token differs.

    Raises ValueError if one answer is longer than the other and all common tokens are equal.
    """
    steps = min(len(direct.token_ids), len(injected.token_ids))
    differing = (step for step in range(steps) if direct.token_ids[step] != injected.token_ids[step])
    step = next(differing, None)
    if step is None:
        if len(direct.token_ids) != len(injected.token_ids):
            raise ValueError(
                f"One answer ends after {steps} equal tokens, and the other continues. Trace both for the same number "
                "of steps, or keep the end token in the trace."
            )
        same = direct.complete and injected.complete and _same_bits(direct.logits_SV, injected.logits_SV)
        return Equality("bitwise" if same else "tokens", None, _max_abs_diff(direct, injected, steps))
    logits_V = direct.logits_SV[step].double()
    margin = float(logits_V[direct.token_ids[step]] - logits_V[injected.token_ids[step]])
    noise = rounding_noise(step)
    return Equality(
        "near_tie" if margin <= 2 * noise else "diverged",
        step,
        _max_abs_diff(direct, injected, step + 1),
        margin,
        noise,
    )


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


def _max_abs_diff(direct: Trace, injected: Trace, steps: int) -> float:
    a_SV, b_SV = direct.logits_SV[:steps].double(), injected.logits_SV[:steps].double()
    finite_SV = a_SV.isfinite() & b_SV.isfinite()
    return float((a_SV[finite_SV] - b_SV[finite_SV]).abs().max())
