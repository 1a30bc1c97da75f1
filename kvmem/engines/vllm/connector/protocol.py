"""What a request and kvmem's KV connector say to one another. Importing this module does not import vLLM.

The connector saves the keys and values of a memory to a file and injects them from there. vLLM loads the connector by
its module path. A request carries its orders in `SamplingParams(extra_args={"kv_transfer_params": {...}})`, under the
keys below. The `kv_transfer_params` of the answer carry a `Report` of what was actually reused.

All files are in one folder. A server takes orders from anyone who may send requests, so no name that a request chooses
is written to the disk: the connector names the files that it saves, and finds only names of the form that it gives.
"""

from __future__ import annotations

import re
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kvmem.cache import sha256
from kvmem.errors import EngineError, StorageError

CONNECTOR_MODULE = "kvmem.engines.vllm.connector.connector"
CONNECTOR_CLASS = "KVMemConnector"
COVERED_VERSIONS = ("0.24.", "0.32.")
"""The versions of vLLM that the connector was written for: vLLM's connector interface is experimental and changes."""

LOAD = "kvmem_load"
"""Name of the file to inject: the longest prefix that file and prompt share, except the prompt's last token. The file
has to be of the request's namespace or of none."""
SAVE = "kvmem_save"
"""True: the keys and values of the whole prompt are written to a new file, which belongs to the request's namespace.
The connector names it, and the report says how. The answer needs two tokens or more: the outcome of a save is known one
step after the prompt's last token."""
ITEM = "kvmem_item"
"""The manifest of the saved file: an `ItemManifest` as JSON. Its token ids are those of the prompt."""
SAVE_KEY = "kvmem_save_key"
"""The key of `save_key`, where only clients that can read the folder may save."""
LEASE = "kvmem_lease"
"""The lease of the saved file: a text of the client's own. The file is kept while the client renews the lease, by the
file `lease_name` of it. Without one, it is kept while requests load it."""
PIN = "kvmem_pin"
"""Name of a pin: when the request finishes, the whole blocks of its prompt stay in the engine's prefix cache, whatever
other requests evict, until a request unpins that name."""
UNPIN = "kvmem_unpin"
"""List of pins to release before the request is given its blocks. Unknown names are ignored."""
PREFETCH = "kvmem_prefetch"
"""List of names of files to read into host memory ahead of time, each of the request's namespace or of none. The
request itself does not wait for them. An empty list only asks for the report."""
INJECT = "kvmem_inject"
"""False: the request gets no memory that it does not name. True: it gets what any request gets, and a report of it."""
PIN_TTL_S = "kvmem_pin_ttl_s"
"""After how many seconds the pin ends by itself. Without it, it lasts until it is released or the engine ends."""
EXPLAIN = "kvmem_explain"
"""Token ids of a prompt: the report tells which memory it would get. Takes the administrator's key."""
ADMIN_KEY = "kvmem_admin_key"
"""The key of the server's own process, which may pin, unpin and explain. Requests of others can't know it."""
REPORT_TO = "kvmem_report_to"
"""A text that no other request has: the report is also written to the folder, to the new file `report_name` of it,
because vLLM's server streams completions without their kv_transfer_params. The client deletes the file."""
REPORT = "kvmem"
"""Key of the report in the answer: the fields of `Report`."""

FOLDER = "kvmem_folder"
FINGERPRINT = "kvmem_fingerprint"
HOST_BYTES = "kvmem_host_bytes"
"""Keys of `kv_connector_extra_config`: the folder, the model's fingerprint as JSON, and how many bytes of files to keep
in host memory, all ranks together."""
READ_BYTES_PER_S = "kvmem_read_bytes_per_s"
"""Key of the same: how many bytes a second a rank reads from files at the most. None: no limit."""
SAVES = "kvmem_saves"
"""Key of the same: who may save: `anyone`, `store` (whoever can read the key in the folder) or `nobody` (default)."""
PINS = "kvmem_pins"
"""Key of the same: True if requests may pin and unpin blocks, which are every request's; by default they may not."""
ORPHANS_AFTER_S = "kvmem_orphans_after_s"
"""Key of the same: after how many seconds without a sign of life from its client a file is deleted. None: never."""

INJECT_MODE = "kvmem_inject_mode"
"""Key of the same: `auto` (a request gets the longest memory of its namespace that its prompt begins with) or `named`
(only a memory that it names; the default on a server). None: as `named`, and no index is kept."""
LEARN = "kvmem_learn"
"""Key of the same: the fields of a `LearnConfig`, where prefixes of the traffic become memories by themselves. Takes
INJECT_MODE `auto`. None: nothing is learned."""
ADMIN_VARIABLE = "KVMEM_ADMIN_KEY"
"""The environment variable that holds the administrator's key in the server's processes. No log shows it."""
AUTO, NAMED = "auto", "named"
"""The values of INJECT_MODE."""

ANYONE, STORE, NOBODY = "anyone", "store", "nobody"
"""The values of SAVES."""
NAMESPACE_END = "\n"
"""Ends the namespace in a cache salt. What follows separates blocks within the namespace."""
NO_LEASE = 32 * "0"
"""The lease in names of files that nothing collects."""
MEMORY_NAME = re.compile(r"(?P<namespace>[0-9a-f]{32})-(?P<lease>[0-9a-f]{32})-[0-9a-f]{32}\.safetensors")
PART_NAME = re.compile(MEMORY_NAME.pattern + r"(\.rank\d+of\d+)?")
LEASE_NAME = re.compile(r"(?P<lease>[0-9a-f]{32})\.lease")
REPORT_NAME = re.compile(r"[0-9a-f]{32}\.report")
KEY_NAME = "kvmem_save_key"


@dataclass
class Report:
    """The outcome of a request."""

    local_tokens: int = 0
    """Prompt tokens from the engine's own prefix cache."""
    injected_tokens: int = 0
    """Prompt tokens from the file."""
    load_error: str = ""
    saved: str = ""
    """Name of the file that was written; "" if none was."""
    save_error: str = ""
    """Why no file was written, although the request ordered it."""
    pinned_tokens: int = 0
    pin_error: str = ""
    preemptions: int = 0
    """How often the engine took the request's blocks away and assigned others later."""
    file_read: bool = False
    """Whether the request waited for its file to be read. False: the file was in host memory, or was not needed."""
    prefetched: int = 0
    """How many files of PREFETCH are in host memory, or are being read."""
    prefetch_error: str = ""
    """Why a file of PREFETCH is not read."""
    memory: str = ""
    """Name of the file that was found for the prompt, where the request named none."""
    explained: dict[str, Any] = field(default_factory=dict)
    """What EXPLAIN asked for: `name`, `tokens` and `reason` of a `Match`, `in_host_memory`, `mode` and `learning`."""
    pins: dict[str, float | None] = field(default_factory=dict)
    """To an administrator: all pins, with the seconds until each ends by itself, None if it does not."""
    host_cache: dict[str, Any] = field(default_factory=dict)
    """The fields of `HostCacheState` when the request ended."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Report:
        """The report that an answer carries; fields that this version does not know are ignored."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def keep_only(self, tokens: int) -> None:
        """Corrects the counts after a failed load: only the first `tokens` tokens were reused."""
        lost = max(self.local_tokens + self.injected_tokens - tokens, 0)
        from_file = min(lost, self.injected_tokens)
        self.injected_tokens -= from_file
        self.local_tokens -= lost - from_file


@dataclass(frozen=True)
class HostCacheState:
    """What host memory holds, all ranks together, and counts since the engine's start."""

    budget_bytes: int = 0
    used_bytes: int = 0
    """Of files that are there or are being read, in whole pages."""
    files: int = 0
    hits: int = 0
    """Requests whose file was there."""
    waits: int = 0
    """Requests that waited for their file to be read."""
    reads: int = 0
    """Files read. Many requests may wait for one read."""
    read_bytes: int = 0
    read_s: float = 0.0
    """Seconds of all reads, each until its slowest rank had the file."""
    failed_reads: int = 0
    evictions: int = 0
    """Files that left for others."""


def digest(text: str) -> str:
    """32 hexadecimal digits that stand for a text of a client, which may be anything, in the name of a file."""
    return sha256(text.encode("utf-8", "surrogatepass"))


def namespace_of(salt: str | None) -> str:
    """The namespace of a request with this cache salt; "" for the default one."""
    return (salt or "").partition(NAMESPACE_END)[0]


def memory_name(namespace: str, lease: str) -> str:
    """A new name for the file of a memory. lease: of `lease_of`, or NO_LEASE."""
    return f"{digest(namespace)}-{lease}-{uuid.uuid4().hex}.safetensors"


def lease_of(client: str) -> str:
    """The lease in the names of files of a client that orders LEASE `client`."""
    return digest(f"lease {client}")


def lease_name(lease: str) -> str:
    """The file whose time of change says when the lease was renewed."""
    return f"{lease}.lease"


def renewal_s(orphans_after_s: float) -> float:
    """How often a lease is renewed, in seconds, if files are deleted so many seconds after the last renewal."""
    return min(orphans_after_s / 8, 10.0)


def check_namespace(name: str, namespace: str) -> None:
    """Raises StorageError for a name that is not one of a memory of this namespace or of the default one.

    The message is the same whether there is such a file or not.
    """
    parts = MEMORY_NAME.fullmatch(name)
    if parts is None or parts["namespace"] not in (digest(namespace), digest("")):
        where = f"the namespace {namespace!r}" if namespace else "the default namespace"
        raise StorageError(f"{name!r} is not a memory of {where}, which is the request's by its cache_salt.")


def file_path(folder: Path, name: str) -> Path:
    """The path of a memory's file, or of one rank's part. Raises StorageError for any other name."""
    if PART_NAME.fullmatch(name) is None:
        raise StorageError(f"{name!r} is not the name of a memory's file: the connector gives the names.")
    return folder / name


FileState = tuple[str, int, int, int, int]
"""A file's name, inode, size and times of change, in nanoseconds."""


def file_state(path: Path) -> FileState:
    """What differs after the file was replaced or changed. Raises StorageError if it is missing or not a plain file."""
    try:
        status = path.lstat()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StorageError(f"{path} can't be read ({reason}). Its memory was deleted, or never saved.") from error
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(f"{path} is not a plain file: a link, a pipe or a folder. Extract its memory again.")
    return path.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def report_name(name: str) -> str:
    """The file that the report `name` is written to. The name itself, which a client chose, is not part of it."""
    return f"{digest(f'report {name}')}.report"


def save_key(folder: Path) -> str:
    """The key that clients need to save; "" if the folder has none.

    It is in a file there, so whoever can read the memories in the folder has it, and others have not.
    """
    try:
        return (folder / KEY_NAME).read_text().strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder / KEY_NAME} can't be read ({error}). Clients need it to save memories.") from error


def make_save_key(folder: Path) -> None:
    """Writes a new key into the folder, if it has none. Servers that share the folder have the same."""
    try:
        with open(folder / KEY_NAME, "x") as file:
            file.write(uuid.uuid4().hex)
    except FileExistsError:
        return
    except OSError as error:
        raise StorageError(f"{folder / KEY_NAME} can't be written ({error}). Give another folder.") from error


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
