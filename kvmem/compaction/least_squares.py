"""Bounded least squares, and matching pursuit with it: fits sums of columns with weights that are not negative."""

from __future__ import annotations

import torch

STEPS = 200
"""Gradient steps of a fit; it ends sooner if a step changes nothing any more."""
AT_ONCE, REFIT_EVERY = 4, 2
"""How many columns matching pursuit takes in a step, and after how many steps it fits the weights again."""


def bounded_least_squares(
    columns_NK: torch.Tensor, target_N: torch.Tensor, low: float, high: float, start_K: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights w between `low` and `high` for which |columns · w − target|² is smallest, (columns,), float64.

    By accelerated projected gradients on the normal equations (Beck and Teboulle, "A Fast Iterative
    Shrinkage-Thresholding Algorithm for Linear Inverse Problems", 2009), from `start`, or from weights of 1. The result
    fits no worse than the start.
    """
    columns_NK, target_N = columns_NK.double(), target_N.double()
    gram_KK, toward_K = columns_NK.T @ columns_NK, columns_NK.T @ target_N
    norm = float(torch.linalg.matrix_norm(gram_KK, 2))
    first_K = torch.ones_like(toward_K) if start_K is None else start_K.double()
    best_K = current_K = ahead_K = first_K.clamp(low, high)
    best = _error(gram_KK, toward_K, best_K)
    momentum = 1.0
    for _ in range(STEPS if norm > 0 else 0):
        next_K = (ahead_K - (gram_KK @ ahead_K - toward_K) / norm).clamp(low, high)
        if torch.equal(next_K, current_K):
            break
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead_K = next_K + (momentum - 1) / grown * (next_K - current_K)
        current_K, momentum = next_K, grown
        if (error := _error(gram_KK, toward_K, current_K)) < best:
            best_K, best = current_K, error
    return best_K


def _error(gram_KK: torch.Tensor, toward_K: torch.Tensor, weights_K: torch.Tensor) -> float:
    """The squared error, less the target's square, which does not depend on the weights."""
    return float(weights_K @ (gram_KK @ weights_K) - 2 * (toward_K @ weights_K))


def matching_pursuit(
    columns_NS: torch.Tensor, target_N: torch.Tensor, count: int, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices of `count` columns, and their weights, that fit the target: (count,) int64 and (count,) float64.

    Each step takes the columns that agree most with what is not fitted yet (Pati et al., "Orthogonal Matching Pursuit",
    1993). The more columns, the smaller the error, or the same.
    """
    columns_NS, target_N = columns_NS.double(), target_N.double()
    chosen: list[int] = []
    weights_K = target_N.new_zeros(0)
    rest_N, step = target_N, 0
    while len(chosen) < count:
        agreement_S = rest_N @ columns_NS
        agreement_S[chosen] = -torch.inf
        new = agreement_S.topk(min(AT_ONCE, count - len(chosen))).indices.tolist()
        chosen += new
        weights_K = torch.cat([weights_K, weights_K.new_full((len(new),), low)])
        step += 1
        if step % REFIT_EVERY == 0 or len(chosen) == count:
            weights_K = bounded_least_squares(columns_NS[:, chosen], target_N, low, high, weights_K)
            rest_N = target_N - columns_NS[:, chosen] @ weights_K
    return torch.tensor(chosen, device=columns_NS.device), weights_K
