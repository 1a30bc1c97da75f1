"""The default folder of a run, outputs/<date>/<time>, which no other run has."""

from __future__ import annotations

import itertools
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf


def new() -> Path:
    """Makes the folder. Of several runs that start within a second, the later ones get -2, -3, … behind the time.

    A folder that can't be made is returned too: whoever writes into it raises the OSError.
    """
    folder = Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    for number in itertools.count(1):
        numbered = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            numbered.mkdir(parents=True)
        except FileExistsError:
            if numbered.is_dir():
                continue
        except OSError:
            pass
        return numbered
    raise AssertionError("unreachable")


OmegaConf.register_new_resolver("run_folder", lambda: str(new()), use_cache=True, replace=True)
