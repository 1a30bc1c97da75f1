"""How far stored keys and values are from an independent forward pass's, and what rounding explains of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Distance(NamedTuple):
    """A distance from the reference, and what rounding explains of it."""

    off: float
    allowed: float


@dataclass(frozen=True)
class KVCheck:
    """How far stored keys and values are from the reference's.

    token: relative: the norm of the difference of a token's keys (or values) over all heads of a layer, over the
    reference's norm; the largest of all tokens. scale: how far the factor that fits a layer's keys (or values) to the
    reference's is from 1; the largest of all layers. It shows errors that are the same everywhere and, for each token,
    below the rounding of 16-bit numbers.
    """

    token: Distance
    scale: Distance
