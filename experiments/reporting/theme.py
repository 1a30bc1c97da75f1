"""The look of the plots, on a light page and on a dark one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib


@dataclass(frozen=True)
class Theme:
    """Colours of one page; the ground is left transparent in an SVG, so that the page's own shows through."""

    ground: str
    ink: str
    faint: str
    injected: str
    direct: str
    ramp: tuple[str, str, str]


LIGHT = Theme("#ffffff", "#22262e", "#d5d9e0", "#0072b2", "#d55e00", ("#eef5fa", "#7db8da", "#00548a"))
DARK = Theme("#14171c", "#e3e6ec", "#3a404b", "#56b4e9", "#e69f00", ("#1d2a35", "#2f7fb0", "#9fd8fa"))


def style(theme: Theme) -> AbstractContextManager[None]:
    return matplotlib.rc_context(
        {
            "font.family": ["DejaVu Sans"],
            "font.size": 9.5,
            "svg.hashsalt": "kvmem",
            "axes.unicode_minus": True,
            "text.parse_math": False,  # labels are text: a $ of theirs is a dollar
            "text.color": theme.ink,
            "axes.labelcolor": theme.ink,
            "axes.edgecolor": theme.faint,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.facecolor": "none",
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": theme.faint,
            "grid.linewidth": 0.6,
            "xtick.color": theme.faint,
            "ytick.color": theme.faint,
            "xtick.labelcolor": theme.ink,
            "ytick.labelcolor": theme.ink,
            "legend.frameon": False,
            "figure.facecolor": theme.ground,
            "savefig.facecolor": theme.ground,
        }
    )
