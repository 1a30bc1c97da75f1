"""Lets Hydra find this project's launchers. Hydra looks for plugins only in the namespace package `hydra_plugins`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[1] / "execution" / "launchers"
"""The folder that holds this project's part of `hydra_plugins`."""


def extend() -> None:
    """Adds `PLUGINS` to the import path, and to PYTHONPATH, which the launchers' jobs inherit.

    Call it before Hydra looks for its plugins. A second call has no effect.

    >>> extend()
    >>> str(PLUGINS) in sys.path and os.environ["PYTHONPATH"].split(os.pathsep).count(str(PLUGINS))
    1
    """
    plugins = str(PLUGINS)
    if plugins not in sys.path:
        sys.path.append(plugins)
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if plugins not in inherited:
        os.environ["PYTHONPATH"] = os.pathsep.join([*inherited, plugins])
