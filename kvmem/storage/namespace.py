"""The name of a namespace's folder, which is another folder on a disk that ignores case too."""

from __future__ import annotations

import hashlib

HASH_DIGITS = 16


def namespace_folder(namespace: str) -> str:
    """The namespace itself, with a hash behind it if it has capital letters: "A" and "a" are one folder on some disks.

    No namespace contains the "~" before the hash. "" for the default namespace.
    """
    if namespace == namespace.lower():
        return namespace
    return f"{namespace}~{hashlib.sha256(namespace.encode()).hexdigest()[:HASH_DIGITS]}"
