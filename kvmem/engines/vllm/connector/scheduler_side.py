"""The scheduler's half: how many tokens a file covers, which transfers go with a step, and what came of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata
from vllm.v1.request import RequestStatus

from kvmem.engines.vllm.connector.block_pins import Pinning
from kvmem.engines.vllm.connector.protocol import ITEM, LOAD, PIN, REPORT, REPORT_TO, SAVE, UNPIN, report_name
from kvmem.errors import StorageError
from kvmem.prompt import common_prefix
from kvmem.storage import read_token_ids

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclass(frozen=True)
class Transfer:
    """Tokens `start` to `end` of a request's blocks, from or to the file `name`. `item`: what a save says of itself."""

    request_id: str
    name: str
    block_ids: tuple[int, ...]
    start: int
    end: int
    item: str = ""


@dataclass
class Transfers(KVConnectorMetadata):
    """What the workers move in one step. `prefills`: a request computes several tokens, so layers run one by one."""

    loads: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)
    prefills: bool = False


@dataclass
class Failures(KVConnectorWorkerMetadata):
    """By request: why its load or save failed in this step, on any rank."""

    loads: dict[str, str] = field(default_factory=dict)
    saves: dict[str, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Failures:
        assert isinstance(other, Failures)
        return Failures(self.loads | other.loads, self.saves | other.saves)


@dataclass
class Report:
    """What became of a request. `local_tokens`: from the engine's own cache; `injected_tokens`: from the file;
    `preemptions`: how often the engine took its blocks away, and gave it others later."""

    local_tokens: int = 0
    injected_tokens: int = 0
    load_error: str = ""
    save_error: str = ""
    pinned_tokens: int = 0
    pin_error: str = ""
    preemptions: int = 0

    def keep_only(self, tokens: int) -> None:
        """Nothing behind the first `tokens` tokens was reused after all."""
        lost = max(self.local_tokens + self.injected_tokens - tokens, 0)
        from_file = min(lost, self.injected_tokens)
        self.injected_tokens -= from_file
        self.local_tokens -= lost - from_file


@dataclass
class _Asked:
    """A live request that wants something of us."""

    load: str | None
    save: str | None
    pin: str | None
    item: str
    report_to: str | None
    prompt_tokens: int
    report: Report = field(default_factory=Report)
    computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    save_sent: bool = False


class Scheduling:
    """One for the engine; keyed by request id."""

    def __init__(self, folder: Path, block_size: int, pinning: Pinning) -> None:
        self.folder = folder
        self.block_size = block_size
        self.pinning = pinning
        self.asked: dict[str, _Asked] = {}
        self.loads: list[Transfer] = []
        self.held: dict[tuple[str, int, int], tuple[int, ...]] = {}

    def arrived(self, request: Request) -> None:
        """A new request, before it gets any block: what it unpins makes room."""
        names = (request.kv_transfer_params or {}).get(UNPIN)
        self.pinning.release(map(str, names) if isinstance(names, list) else ())

    def matched_tokens(self, request: Request, computed: int) -> int:
        """How many tokens behind the `computed` ones the request's file can give. May be asked more than once."""
        asked = self._asked(request)
        if asked is None:
            return 0
        injected = max(self._covered(asked, request.prompt_token_ids) - computed, 0) if asked.load else 0
        asked.computed = computed
        if request.num_preemptions == 0:  # a preempted request comes back with blocks of its own, which are no hit
            asked.report.local_tokens, asked.report.injected_tokens = computed, injected
        return injected

    def allocated(self, request: Request, block_ids: Iterable[int], injected: int) -> None:
        """The request has its blocks; `injected` tokens are to be loaded before this step's forward."""
        asked = self._asked(request)
        if asked is None:
            return
        asked.block_ids = list(block_ids)
        if injected > 0:
            assert asked.load is not None
            end = asked.computed + injected
            self.loads.append(Transfer(request.request_id, asked.load, tuple(asked.block_ids), asked.computed, end))

    def step(self, output: SchedulerOutput) -> Transfers:
        """This step's transfers: loads now, and a save in the step that computes the last of its prompt."""
        counts = output.num_scheduled_tokens
        transfers = Transfers(loads=self.loads, prefills=any(count > 1 for count in counts.values()))
        self.loads = []
        computed = {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        running = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for request_id, blocks, done in running:
            computed[request_id] = done
            if blocks and request_id in self.asked and request_id not in cached.resumed_req_ids:
                self.asked[request_id].block_ids += blocks[0]  # a resumed one got all its blocks in `allocated`
        for request_id, done in computed.items():
            asked = self.asked.get(request_id)
            if asked is None or asked.save is None or asked.save_sent:
                continue
            if done + counts[request_id] < asked.prompt_tokens:
                continue
            asked.save_sent = True
            transfers.saves.append(
                Transfer(request_id, asked.save, tuple(asked.block_ids), 0, asked.prompt_tokens, asked.item)
            )
        return transfers

    def workers_said(self, output: KVConnectorOutput) -> None:
        """A failed load costs every request on its blocks the tokens from there on; vLLM has them computed again."""
        failures = output.kv_connector_worker_meta
        if isinstance(failures, Failures):
            for request_id, reason in failures.loads.items():
                if request_id in self.asked:
                    self.asked[request_id].report.load_error = reason
                    self.asked[request_id].save_sent = False
            for request_id, reason in failures.saves.items():
                if request_id in self.asked:
                    self.asked[request_id].report.save_error = reason
        if output.invalid_block_ids:
            for asked in self.asked.values():
                bad = next((i for i, block in enumerate(asked.block_ids) if block in output.invalid_block_ids), None)
                if bad is not None:
                    asked.report.keep_only(bad * self.block_size)
                    asked.report.load_error = asked.report.load_error or "Another request's load of its blocks failed."

    def finished(self, request: Request, block_ids: Sequence[int]) -> dict[str, Any] | None:
        """The report, for the answer's kv_transfer_params. The blocks are still the request's, and can be pinned."""
        asked = self.asked.pop(request.request_id, None)
        if asked is None:
            return None
        report = asked.report
        report.preemptions = request.num_preemptions
        if asked.pin is not None and not report.load_error:
            whole = min(request.num_computed_tokens, asked.prompt_tokens) // self.block_size
            report.pin_error = self.pinning.hold(asked.pin, block_ids[:whole])
            report.pinned_tokens = 0 if report.pin_error else whole * self.block_size
        if asked.report_to is not None and request.status is not RequestStatus.FINISHED_ABORTED:
            self._write_report(asked.report_to, report)
        return {REPORT: asdict(report)}

    def _write_report(self, name: str, report: Report) -> None:
        try:
            file_path(self.folder, report_name(name)).write_text(json.dumps(asdict(report)))
        except (StorageError, OSError):
            return  # a bad name or a full disk is the asker's error, who misses the file; others go on

    def _asked(self, request: Request) -> _Asked | None:
        if request.request_id not in self.asked:
            params = request.kv_transfer_params or {}
            # A server takes these from anyone: what is no name becomes one that no file has, and not a dead engine.
            load, save, pin, report_to = (
                None if params.get(key) is None else str(params[key]) for key in (LOAD, SAVE, PIN, REPORT_TO)
            )
            if load is None and save is None and pin is None:
                return None
            item, tokens = str(params.get(ITEM, "")), request.num_prompt_tokens
            self.asked[request.request_id] = _Asked(load, save, pin, item, report_to, tokens)
        return self.asked[request.request_id]

    def _covered(self, asked: _Asked, prompt_ids: Sequence[int] | None) -> int:
        """Tokens that file and prompt share, but for the prompt's last, whose logits are wanted."""
        assert asked.load is not None
        if prompt_ids is None:
            asked.report.load_error = "The prompt came as embeddings, and a memory is matched by ids. Send token ids."
            return 0
        try:
            held = self._held_ids(asked.load)
        except StorageError as error:
            asked.report.load_error = str(error)
            return 0
        most = min(len(held), len(prompt_ids) - 1)
        return most if tuple(prompt_ids[:most]) == held[:most] else common_prefix(held[:most], prompt_ids)

    def _held_ids(self, name: str) -> tuple[int, ...]:
        """The token ids of a file, read from its header once for each state of the file."""
        path = file_path(self.folder, name)
        try:
            stat = path.stat()
        except OSError as error:
            raise StorageError(f"{path} can't be read ({error}). Its memory was deleted, or never saved.") from error
        key = (name, stat.st_ino, stat.st_mtime_ns)
        if key not in self.held:
            self.held = {kept: ids for kept, ids in self.held.items() if kept[0] != name}
            self.held[key] = read_token_ids(path)
        return self.held[key]


def file_path(folder: Path, name: str) -> Path:
    """Where the file `name` lies. Raises StorageError for a name that leads out of the folder: it may be foreign."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise StorageError(f"{name!r} is no plain file name. Name a file of the connector's folder, without a path.")
    return folder / name
