"""What the scheduler's half of the connector and its workers say to one another in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvmem.engines.vllm.connector.background_saves import SaveDone
from kvmem.engines.vllm.connector.file_reads import Read, ReadDone
from kvmem.engines.vllm.connector.protocol import FileState


@dataclass(frozen=True)
class Transfer:
    """Tokens `start` to `end` of a request's blocks, from or to the file `name`."""

    request_id: str
    name: str
    block_ids: tuple[int, ...]
    start: int
    end: int
    item: str = ""
    """The manifest of a saved file, as JSON."""
    key: FileState | None = None
    """Of a loaded file, its state when it was read into host memory."""


@dataclass
class Transfers(KVConnectorMetadata):
    """What the workers transfer in one step."""

    loads: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    """Files to read into host memory from now on."""
    drops: list[FileState] = field(default_factory=list)
    """Files that leave host memory before this step's reads begin."""
    idle: bool = False
    """True if no request computes anything: the engine has nothing to do until a read ends."""
    background_saves: list[Transfer] = field(default_factory=list)
    """Files to write while the engine goes on, from blocks that are full after this step."""
    prefills: bool = False
    """True if a request computes several tokens: then the layers run one by one."""


@dataclass
class Outcomes(KVConnectorWorkerMetadata):
    """By request id, what became of its load and save in this step on any rank."""

    failed_loads: dict[str, str] = field(default_factory=dict)
    failed_saves: dict[str, str] = field(default_factory=dict)
    """Each with the reason."""
    saved: set[str] = field(default_factory=set)
    reads: list[ReadDone] = field(default_factory=list)
    """Reads that have ended, not necessarily begun in this step. Each rank reports each read once."""
    background_saves: list[SaveDone] = field(default_factory=list)
    """Likewise, the stages of background saves."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Outcomes:
        """The outcomes of two ranks."""
        assert isinstance(other, Outcomes)
        return Outcomes(
            self.failed_loads | other.failed_loads,
            self.failed_saves | other.failed_saves,
            self.saved | other.saved,
            self.reads + other.reads,
            self.background_saves + other.background_saves,
        )
