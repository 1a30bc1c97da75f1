"""Text files of the user."""

from __future__ import annotations

import stat
from pathlib import Path

from kvmem.errors import ConfigError


def read_text_file(path: Path, knob: str) -> str:
    """The text of a UTF-8 file, without a byte order mark at its head.

    `knob` is the configuration key that named the file. Raises ConfigError, with both, if there is no such file, or it
    is a folder, a pipe or a device, can't be read, or is not UTF-8.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for somebody to write into it
            raise ConfigError(f"{knob}: {path} is a folder, a pipe or a device. Give a file.")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{knob}: there is no file {path}. Paths are relative to the working directory.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{knob}: {path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ConfigError(f"{knob}: {path} can't be read ({error}). Give a file that can.") from error
