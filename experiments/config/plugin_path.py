"""Our launchers, as plugins of Hydra's, which it takes from the namespace package `hydra_plugins` alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[1] / "execution" / "launchers"
"""Where our part of `hydra_plugins` lies."""


def make_known() -> None:
    """Lets Hydra find our launchers, here and in the jobs that they start, which inherit PYTHONPATH.

    Call it before Hydra looks for its plugins; a second call changes nothing.

    >>> make_known()
    >>> str(PLUGINS) in sys.path and os.environ["PYTHONPATH"].split(os.pathsep).count(str(PLUGINS))
    1
    """
    here = str(PLUGINS)
    if here not in sys.path:
        sys.path.append(here)
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if here not in inherited:
        os.environ["PYTHONPATH"] = os.pathsep.join([*inherited, here])
