"""The scheduler's half: how many tokens a file covers, which transfers a step runs, and the report of each request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata
from vllm.v1.request import RequestStatus

from kvmem.engines.vllm.connector.block_pins import BlockPins
from kvmem.engines.vllm.connector.protocol import (
    ITEM,
    LOAD,
    PIN,
    REPORT,
    REPORT_TO,
    SAVE,
    UNPIN,
    FileState,
    Report,
    file_path,
    file_state,
    report_name,
)
from kvmem.errors import StorageError
from kvmem.prompt import common_prefix
from kvmem.storage import read_token_ids

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


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


@dataclass
class Transfers(KVConnectorMetadata):
    """What the workers transfer in one step."""

    loads: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)
    prefills: bool = False
    """True if a request computes several tokens: then the layers run one by one."""


@dataclass
class Failures(KVConnectorWorkerMetadata):
    """By request id, why its load or save failed in this step on any rank."""

    loads: dict[str, str] = field(default_factory=dict)
    saves: dict[str, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Failures:
        """The failures of two ranks."""
        assert isinstance(other, Failures)
        return Failures(self.loads | other.loads, self.saves | other.saves)


@dataclass
class Orders:
    """A running request that gave the connector orders, and its report."""

    load: str | None
    save: str | None
    pin: str | None
    item: str
    report_to: str | None
    prompt_tokens: int
    report: Report = field(default_factory=Report)
    computed: int = 0
    """Tokens of the prompt in the engine's prefix cache when the request was scheduled."""
    block_ids: list[int] = field(default_factory=list)
    save_sent: bool = False


class SchedulerSide:
    """Plans the transfers of each step, and keeps the reports until their requests finish. One for each engine."""

    def __init__(self, folder: Path, block_size: int, pins: BlockPins) -> None:
        self.folder = folder
        self.block_size = block_size
        self.pins = pins
        self.orders: dict[str, Orders] = {}
        """Orders of running requests, by request id."""
        self.loads: list[Transfer] = []
        """Loads of the next step."""
        self.file_token_ids: dict[FileState, tuple[int, ...]] = {}
        """Token ids of files, by name, inode and time of change."""

    def on_new_request(self, request: Request) -> None:
        """Releases what a new request unpins, before it is given any block."""
        names = (request.kv_transfer_params or {}).get(UNPIN)
        self.pins.release(map(str, names) if isinstance(names, list) else ())

    def matched_tokens(self, request: Request, computed: int) -> int:
        """How many tokens behind the first `computed` ones the request's file gives. May be called more than once."""
        orders = self._orders_of(request)
        if orders is None:
            return 0
        injected = max(self._covered(orders, request.prompt_token_ids) - computed, 0) if orders.load else 0
        orders.computed = computed
        if request.num_preemptions == 0:  # a preempted request returns with blocks of its own, which are not a hit
            orders.report.local_tokens, orders.report.injected_tokens = computed, injected
        return injected

    def allocated(self, request: Request, block_ids: Iterable[int], injected: int) -> None:
        """Records the request's blocks. `injected` tokens are loaded into them before this step's forward pass."""
        orders = self._orders_of(request)
        if orders is None:
            return
        orders.block_ids = list(block_ids)
        if injected > 0:
            assert orders.load is not None
            end = orders.computed + injected
            self.loads.append(Transfer(request.request_id, orders.load, tuple(orders.block_ids), orders.computed, end))

    def plan_step(self, output: SchedulerOutput) -> Transfers:
        """This step's transfers: the loads so far, and each save in the step that computes its prompt's last token."""
        scheduled = output.num_scheduled_tokens
        transfers = Transfers(loads=self.loads, prefills=any(tokens > 1 for tokens in scheduled.values()))
        self.loads = []
        computed = {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        running = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for request_id, new_blocks, computed_tokens in running:
            computed[request_id] = computed_tokens
            if new_blocks and request_id in self.orders and request_id not in cached.resumed_req_ids:
                self.orders[request_id].block_ids += new_blocks[0]  # `allocated` has all blocks of a resumed request
        for request_id, computed_tokens in computed.items():
            orders = self.orders.get(request_id)
            if orders is None or orders.save is None or orders.save_sent:
                continue
            if computed_tokens + scheduled[request_id] < orders.prompt_tokens:
                continue
            orders.save_sent = True
            transfers.saves.append(
                Transfer(request_id, orders.save, tuple(orders.block_ids), 0, orders.prompt_tokens, orders.item)
            )
        return transfers

    def record_failures(self, output: KVConnectorOutput) -> None:
        """Records what the workers report. vLLM computes the tokens of a failed load, and all that follow, again, for
        every request that has the failed blocks."""
        failures = output.kv_connector_worker_meta
        if isinstance(failures, Failures):
            for request_id, reason in failures.loads.items():
                if request_id in self.orders:
                    self.orders[request_id].report.load_error = reason
                    self.orders[request_id].save_sent = False
            for request_id, reason in failures.saves.items():
                if request_id in self.orders:
                    self.orders[request_id].report.save_error = reason
        if output.invalid_block_ids:
            for orders in self.orders.values():
                invalid = (i for i, block in enumerate(orders.block_ids) if block in output.invalid_block_ids)
                first_invalid = next(invalid, None)
                if first_invalid is not None:
                    orders.report.keep_only(first_invalid * self.block_size)
                    orders.report.load_error = (
                        orders.report.load_error or "Another request's load of its blocks failed."
                    )

    def on_finished(self, request: Request, block_ids: Sequence[int]) -> dict[str, Any] | None:
        """The report, for the answer's kv_transfer_params. The request still has its blocks, so they can be pinned."""
        orders = self.orders.pop(request.request_id, None)
        if orders is None:
            return None
        report = orders.report
        report.preemptions = request.num_preemptions
        if orders.pin is not None and not report.load_error:
            whole_blocks = min(request.num_computed_tokens, orders.prompt_tokens) // self.block_size
            report.pin_error = self.pins.pin(orders.pin, block_ids[:whole_blocks])
            report.pinned_tokens = 0 if report.pin_error else whole_blocks * self.block_size
        if orders.report_to is not None and request.status is not RequestStatus.FINISHED_ABORTED:
            self._write_report(orders.report_to, report)
        return {REPORT: asdict(report)}

    def _write_report(self, name: str, report: Report) -> None:
        try:
            file_path(self.folder, report_name(name)).write_text(json.dumps(asdict(report)))
        except (StorageError, OSError):
            return  # a bad name or a full disk is an error for the client, who misses the file; other requests go on

    def _orders_of(self, request: Request) -> Orders | None:
        """The request's orders; None if it gave none."""
        if request.request_id not in self.orders:
            params = request.kv_transfer_params or {}
            # A server takes these from anyone: values that are not names become names that no file has.
            load, save, pin, report_to = (
                None if params.get(key) is None else str(params[key]) for key in (LOAD, SAVE, PIN, REPORT_TO)
            )
            if load is None and save is None and pin is None:
                return None
            item, tokens = str(params.get(ITEM, "")), request.num_prompt_tokens
            self.orders[request.request_id] = Orders(load, save, pin, item, report_to, tokens)
        return self.orders[request.request_id]

    def _covered(self, orders: Orders, prompt_ids: Sequence[int] | None) -> int:
        """How many first tokens file and prompt share, without the prompt's last one, whose logits are needed."""
        assert orders.load is not None
        if prompt_ids is None:
            orders.report.load_error = "The prompt came as embeddings, and a memory is matched by ids. Send token ids."
            return 0
        try:
            file_ids = self._token_ids_of(orders.load)
        except StorageError as error:
            orders.report.load_error = str(error)
            return 0
        most = min(len(file_ids), len(prompt_ids) - 1)
        return most if tuple(prompt_ids[:most]) == file_ids[:most] else common_prefix(file_ids[:most], prompt_ids)

    def _token_ids_of(self, name: str) -> tuple[int, ...]:
        """The token ids of a file, read from its header once for each state of the file."""
        path = file_path(self.folder, name)
        key = file_state(path)
        if key not in self.file_token_ids:
            self.file_token_ids = {other: ids for other, ids in self.file_token_ids.items() if other[0] != name}
            self.file_token_ids[key] = read_token_ids(path)
        return self.file_token_ids[key]
