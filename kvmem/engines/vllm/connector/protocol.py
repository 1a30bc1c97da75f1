"""What a request and kvmem's KV connector say to one another. Importing this module does not import vLLM.

The connector saves the keys and values of a memory to a file and injects them from there. vLLM loads the connector by
its module path. A request carries its orders in `SamplingParams(extra_args={"kv_transfer_params": {...}})`, under the
keys below. The `kv_transfer_params` of the answer carry a `Report` of what was actually reused. Requests give file
names, not paths: all files are in one folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvmem.errors import EngineError, StorageError

CONNECTOR_MODULE = "kvmem.engines.vllm.connector.connector"
CONNECTOR_CLASS = "KVMemConnector"
COVERED_VERSIONS = ("0.24.", "0.32.")
"""The versions of vLLM that the connector was written for: vLLM's connector interface is experimental and changes."""

LOAD = "kvmem_load"
"""Name of the file to inject: the longest prefix that file and prompt share, except the prompt's last token."""
SAVE = "kvmem_save"
"""Name of the file to write: the keys and values of the whole prompt."""
ITEM = "kvmem_item"
"""The manifest of the saved file: an `ItemManifest` as JSON."""
PIN = "kvmem_pin"
"""Name of a pin: when the request finishes, the whole blocks of its prompt stay in the engine's prefix cache, whatever
other requests evict, until a request unpins that name."""
UNPIN = "kvmem_unpin"
"""List of pins to release before the request is given its blocks. Unknown names are ignored."""
REPORT_TO = "kvmem_report_to"
"""Name of a report: it is also written to the folder, to the file `report_name(name)`, because vLLM's server streams
completions without their kv_transfer_params. The client deletes the file."""
REPORT = "kvmem"
"""Key of the report in the answer: the fields of `Report`."""

FOLDER = "kvmem_folder"
FINGERPRINT = "kvmem_fingerprint"
HOST_BYTES = "kvmem_host_bytes"
"""Keys of `kv_connector_extra_config`: the folder, the model's fingerprint as JSON, and how many bytes of opened files
to keep in host memory."""


@dataclass
class Report:
    """The outcome of a request."""

    local_tokens: int = 0
    """Prompt tokens from the engine's own prefix cache."""
    injected_tokens: int = 0
    """Prompt tokens from the file."""
    load_error: str = ""
    save_error: str = ""
    pinned_tokens: int = 0
    pin_error: str = ""
    preemptions: int = 0
    """How often the engine took the request's blocks away and assigned others later."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Report:
        """The report that an answer carries; fields that this version does not know are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def keep_only(self, tokens: int) -> None:
        """Corrects the counts after a failed load: only the first `tokens` tokens were reused."""
        lost = max(self.local_tokens + self.injected_tokens - tokens, 0)
        from_file = min(lost, self.injected_tokens)
        self.injected_tokens -= from_file
        self.local_tokens -= lost - from_file


def file_path(folder: Path, name: str) -> Path:
    """The path of the file `name`. Raises StorageError for a name that leads out of the folder: clients choose it."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise StorageError(f"{name!r} is not a plain file name. Name a file of the connector's folder, without a path.")
    return folder / name


FileState = tuple[str, int, int, int, int]
"""A file's name, inode, size and times of change."""


def file_state(path: Path) -> FileState:
    """What differs after the file was replaced or changed. Raises StorageError if it is missing."""
    try:
        stat = path.stat()
    except OSError as error:
        raise StorageError(f"{path} can't be read ({error}). Its memory was deleted, or never saved.") from error
    return path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def report_name(name: str) -> str:
    """The file that the report `name` is written to. It never has the name of a memory's file."""
    return f"{name}.report"


def part_name(name: str, rank: int, ranks: int) -> str:
    """The file that one tensor-parallel rank writes, with its own heads. With one rank it is the whole file."""
    return name if ranks == 1 else f"{name}.rank{rank}of{ranks}"


def check_version(version: str) -> None:
    """Raises EngineError for a version of vLLM that the connector was not written for."""
    if not version.startswith(COVERED_VERSIONS):
        raise EngineError(
            f"vLLM {version} is not covered: the KV connector was written for "
            f"{' and '.join(covered + 'x' for covered in COVERED_VERSIONS)}. Install one of them."
        )
