"""Commands that run with a small or read-only disk of their own, in a mount namespace that ends with them."""

from __future__ import annotations

import shlex
import subprocess
from functools import cache
from pathlib import Path


@cache
def why_not() -> str:
    """Why there are no such namespaces here; "" if there are."""
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or "unshare failed"


def with_disk(folder: Path, options: str, command: list[str]) -> list[str]:
    """`command`, for which `folder` is a tmpfs with these mount options, such as "size=64k" or "ro"."""
    mount = shlex.join(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", f"{mount} && exec {shlex.join(command)}"]
