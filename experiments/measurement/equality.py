"""How equal two answers are: the graded comparison of the direct and the injected arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Grade = Literal["bitwise", "tokens", "near_tie", "diverged"]
GRADES: tuple[Grade, ...] = get_args(Grade)
"""From best to worst; only the last one fails."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A greedy answer: its tokens, and the logits (steps, vocab) that gave each.

    Raises ValueError where a token is not the largest of its logits, for a margin says something of a greedy choice
    only; NaN logits are refused by the same check.
    """

    token_ids: tuple[int, ...]
    logits_SV: torch.Tensor
    complete: bool = True
    """False: the largest log-probabilities only, -inf for all others; such an answer is at best `tokens` equal."""

    def __post_init__(self) -> None:
        if not self.token_ids or self.logits_SV.ndim != 2 or len(self.token_ids) != self.logits_SV.shape[0]:
            raise ValueError(
                f"{len(self.token_ids)} tokens and logits of shape {tuple(self.logits_SV.shape)} are no answer."
            )
        chosen_S = self.logits_SV.gather(1, torch.tensor(self.token_ids, device=self.logits_SV.device)[:, None])[:, 0]
        off = (chosen_S != self.logits_SV.amax(dim=1)).nonzero()
        if len(off):
            step = int(off[0])
            raise ValueError(
                f"Token {self.token_ids[step]} of step {step} is not its logits' maximum: not a greedy answer."
            )


@dataclass(frozen=True)
class Equality:
    """`logit_max_abs_diff` is taken over the steps up to and including the first token that differs: until there both
    arms have received the same tokens, and after it the logits belong to different texts. `near_tie_margin` and
    `rounding_noise` are measured only where a token differs."""

    grade: Grade
    first_difference: int | None
    logit_max_abs_diff: float
    near_tie_margin: float | None = None
    rounding_noise: float | None = None


def grade(direct: Trace, injected: Trace, rounding_noise: Callable[[int], float]) -> Equality:
    """Compares two greedy answers to the same prompt.

    bitwise    the logits of every step are equal to the bit
    tokens     every token is equal
    near_tie   at the first token that differs, rounding alone can have made the difference
    diverged   it can't

    What rounding can do: `rounding_noise(step)` is the largest difference between the direct arm's own logits of that
    step, prefilled in different chunkings; the injected arm has no part in it, or else a wrong cache would count as
    rounding. In the direct arm its own token leads the injected arm's by `margin` >= 0. Each of the two logits can have
    moved by the noise, the one down and the other up, so rounding can turn their order only if margin <= 2 × noise.

    `rounding_noise` costs two prefills, and is called only where a token differs.
    """
    steps = min(len(direct.token_ids), len(injected.token_ids))
    differing = (step for step in range(steps) if direct.token_ids[step] != injected.token_ids[step])
    step = next(differing, None)
    if step is None:
        if len(direct.token_ids) != len(injected.token_ids):
            raise ValueError(
                f"One answer ends after {steps} equal tokens and the other goes on: trace both for "
                "as many steps, or keep the end token in the trace."
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
    """How many of each grade, from best to worst, zeros included."""
    counts = Counter(grades)
    unknown = counts.keys() - set(GRADES)
    if unknown:
        raise ValueError(f"No such grade: {', '.join(sorted(unknown))}. Grades: {', '.join(GRADES)}.")
    return {name: counts[name] for name in GRADES}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares bytes: torch.equal would take 0.0 and -0.0 for the same."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _max_abs_diff(direct: Trace, injected: Trace, steps: int) -> float:
    a_SV, b_SV = direct.logits_SV[:steps].double(), injected.logits_SV[:steps].double()
    finite_SV = a_SV.isfinite() & b_SV.isfinite()
    return float((a_SV[finite_SV] - b_SV[finite_SV]).abs().max())
