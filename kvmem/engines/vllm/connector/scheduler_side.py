"""The scheduler's half: how many tokens a file covers, which transfers a step runs, and the report of each request."""

from __future__ import annotations

import hmac
import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
from vllm.v1.request import RequestStatus

from kvmem.engines.vllm.connector import counts
from kvmem.engines.vllm.connector.block_pins import BlockPins
from kvmem.engines.vllm.connector.counts import Counts, key_of
from kvmem.engines.vllm.connector.file_reads import Read
from kvmem.engines.vllm.connector.host_files import HostFiles
from kvmem.engines.vllm.connector.lessons import Lessons
from kvmem.engines.vllm.connector.memory_index import MemoryIndex
from kvmem.engines.vllm.connector.orphans import Orphans
from kvmem.engines.vllm.connector.protocol import (
    ADMIN_KEY,
    ANYONE,
    AUTO,
    EXPLAIN,
    INJECT,
    ITEM,
    LEASE,
    LOAD,
    NAMED,
    NO_LEASE,
    NOBODY,
    PIN,
    PIN_TTL_S,
    PREFETCH,
    REPORT,
    REPORT_TO,
    SAVE,
    SAVE_KEY,
    UNPIN,
    FileState,
    Report,
    check_namespace,
    file_path,
    file_state,
    lease_of,
    memory_name,
    namespace_of,
    part_name,
    report_name,
    save_key,
)
from kvmem.engines.vllm.connector.transfers import Outcomes, Transfer, Transfers
from kvmem.errors import StorageError
from kvmem.prompt import common_prefix
from kvmem.storage import ItemHead, ItemManifest, read_head

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


ORDERS = (LOAD, SAVE, PIN, PREFETCH, EXPLAIN)
"""A request with one of these gets no memory that it does not name."""
MOST_PREFETCHED = 1000
"""How many files one request may prefetch: the engine looks at each before its next step."""


@dataclass(frozen=True)
class Permissions:
    """What requests may order, besides loads."""

    saves: str = NOBODY
    """ANYONE, STORE or NOBODY."""
    pins: bool = False
    admin_key: str = ""
    """Who gives it may pin, unpin and explain. "": nobody is an administrator."""
    inject: str = NAMED
    """AUTO or NAMED."""


@dataclass
class Orders:
    """A running request that gave the connector orders, or that is given a memory which it did not name; its report."""

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
    loaded_from: Read | None = None
    """The file that covers the prompt, as it is in host memory."""
    covered: int = 0
    """How many first tokens of the prompt that file covers."""
    is_auto: bool = False
    """Whether the file is found by the prompt's tokens."""
    wants_report: bool = True
    pin_ttl_s: float = math.inf
    save_sent: bool = False
    saved: bool = False
    """Whether every rank that reported has written its file."""


class SchedulerSide:
    """Plans the transfers of each step, and keeps the reports until their requests finish. One for each engine."""

    def __init__(
        self,
        folder: Path,
        block_size: int,
        ranks: int,
        pins: BlockPins,
        permissions: Permissions,
        orphans: Orphans | None,
        host_files: HostFiles,
        rank_share: float,
        index: MemoryIndex | None = None,
        lessons: Callable[[Counts], Lessons] | None = None,
    ) -> None:
        """rank_share: which part of a file's keys and values each rank keeps. index: of the folder, if one is kept; its
        files are read now. lessons: makes what learns from the traffic, if anything does."""
        self.index = index
        if index is not None:
            index.refresh(None)
        self.counts = Counts(folder)
        self.lessons = None if lessons is None or index is None else lessons(self.counts)
        if self.lessons is not None and index is not None:
            self.lessons.adopt(index.learned())
        self.local: dict[str, int] = {}
        """For requests that wait, the tokens in the engine's prefix cache when they were last looked at."""
        self.host_files = host_files
        self.rank_share = rank_share
        self.folder = folder
        self.block_size = block_size
        self.ranks = ranks
        self.pins = pins
        self.permissions = permissions
        self.orphans = orphans
        self.looked_up: set[str] = set()
        """Running requests whose prompts were looked up in the index."""
        self.orders: dict[str, Orders] = {}
        """Orders of running requests, by request id."""
        self.loads: list[Transfer] = []
        """Loads of the next step."""
        self.heads: dict[FileState, ItemHead] = {}
        """What files state, by name, inode and time of change."""

    def on_new_request(self, request: Request) -> None:
        """Releases what a new request unpins, before it is given any block, and has read what it prefetches."""
        params = request.kv_transfer_params or {}
        names = params.get(UNPIN)
        self.pins.release_ended()
        if names is not None and self._may_pin(params):
            self.pins.release(map(str, names) if isinstance(names, list) else ())
        if self.index is not None:
            self.index.refresh()
        if isinstance(params.get(PREFETCH), list):
            self._prefetch(request, params[PREFETCH])

    def matched_tokens(self, request: Request, computed: int) -> int | None:
        """How many tokens behind the first `computed` ones the request's file gives. None: its file is being read, and
        the engine asks again in its next step. The request holds no blocks meanwhile."""
        self.local[request.request_id] = computed
        orders = self._orders_of(request)
        if orders is None:
            return 0
        injected = 0
        if orders.load is not None and not orders.report.load_error:
            injected = max(self._covered(orders, request.prompt_token_ids) - computed, 0)
        if orders.is_auto and computed > 0 and injected < self.block_size:
            injected = 0  # the engine holds as much, in its whole blocks
        if injected > 0:
            assert orders.loaded_from is not None
            reason = self.host_files.failure(orders.loaded_from, request.request_id)
            if reason:
                self._fail_load(orders, reason)
                injected = 0
            elif not self.host_files.is_ready(orders.loaded_from, request.request_id):
                orders.report.file_read = True
                return None
            elif self.lessons is not None and not self.heads[orders.loaded_from.key].is_plain:
                self.lessons.distrust(request.cache_salt)
        orders.computed = computed
        if request.num_preemptions == 0:  # a preempted request returns with blocks of its own, which are not a hit
            orders.report.local_tokens, orders.report.injected_tokens = computed, injected
        return injected

    def allocated(self, request: Request, block_ids: Iterable[int], injected: int) -> None:
        """Records the request's blocks. `injected` tokens are loaded into them before this step's forward pass."""
        orders = self._orders_of(request)
        if request.num_preemptions == 0:
            self._count(request, injected, orders)
        block_ids = list(block_ids)
        if self.lessons is not None:
            self.lessons.allocated(request.request_id, block_ids)
        if orders is None:
            return
        orders.block_ids = block_ids
        if injected > 0:
            assert orders.load is not None
            assert orders.loaded_from is not None
            end, key = orders.computed + injected, orders.loaded_from.key
            self.loads.append(
                Transfer(request.request_id, orders.load, tuple(orders.block_ids), orders.computed, end, key=key)
            )

    def plan_step(self, output: SchedulerOutput) -> Transfers:
        """This step's transfers: the loads so far, and each save in the step that computes its prompt's last token."""
        scheduled = output.num_scheduled_tokens
        self.pins.release_ended()
        reads, drops = self.host_files.plan()
        prefills = any(tokens > 1 for tokens in scheduled.values())
        transfers = Transfers(self.loads, reads=reads, drops=drops, idle=not scheduled, prefills=prefills)
        for load in self.loads:  # drops are planned after this step, in which the copies from host memory end
            self.host_files.release(load.request_id)
        self.loads = []
        computed = {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        running = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for request_id, new_blocks, computed_tokens in running:
            computed[request_id] = computed_tokens
            if new_blocks and self.lessons is not None and request_id not in cached.resumed_req_ids:
                self.lessons.more_blocks(request_id, new_blocks[0])
            if new_blocks and request_id in self.orders and request_id not in cached.resumed_req_ids:
                self.orders[request_id].block_ids += new_blocks[0]  # `allocated` has all blocks of a resumed request
        for request_id, computed_tokens in computed.items():
            orders = self.orders.get(request_id)
            if orders is None or orders.save is None or orders.save_sent:
                continue
            if computed_tokens + scheduled[request_id] < orders.prompt_tokens:
                continue
            orders.save_sent = True
            item = self._marked(orders)
            transfers.saves.append(
                Transfer(request_id, orders.save, tuple(orders.block_ids), 0, orders.prompt_tokens, item)
            )
        if self.lessons is not None:
            transfers.background_saves = self.lessons.plan(computed, scheduled, bool(transfers.loads))
        return transfers

    def record_outcomes(self, output: KVConnectorOutput) -> None:
        """Records what the workers report. vLLM computes the tokens of a failed load, and all that follow, again, for
        every request that has the failed blocks."""
        outcomes = output.kv_connector_worker_meta
        if isinstance(outcomes, Outcomes):
            self.host_files.record(outcomes.reads)
            if self.lessons is not None:
                self.lessons.record(outcomes.reads, outcomes.background_saves)
            self.counts.changed = True
            for request_id, reason in outcomes.failed_loads.items():
                if request_id in self.orders:
                    self.orders[request_id].report.load_error = self._without_folder(reason)
                    self.orders[request_id].save_sent = False
            for request_id, reason in outcomes.failed_saves.items():
                if request_id in self.orders:
                    self.orders[request_id].report.save_error = self._without_folder(reason)
            for request_id in outcomes.saved - outcomes.failed_loads.keys():
                if request_id in self.orders:
                    self.orders[request_id].saved = True
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
        self.local.pop(request.request_id, None)
        self.looked_up.discard(request.request_id)
        if self.lessons is not None:
            self.lessons.finished(request.request_id)
        orders = self.orders.pop(request.request_id, None)
        if orders is None:
            return None
        self.host_files.release(request.request_id)
        report = orders.report
        report.host_cache = asdict(self.host_files.state())
        report.preemptions = request.num_preemptions
        if orders.save is not None:
            self._close_save(orders, request)
        if orders.pin is not None and not report.load_error and not report.pin_error:
            whole_blocks = min(request.num_computed_tokens, orders.prompt_tokens) // self.block_size
            report.pin_error = self.pins.pin(orders.pin, block_ids[:whole_blocks], orders.pin_ttl_s)
            report.pinned_tokens = 0 if report.pin_error else whole_blocks * self.block_size
        if report.load_error:
            self.counts.add(counts.FAILED_LOADS)
        if self._is_admin(request.kv_transfer_params or {}):
            report.pins = self.pins.remaining_s()
        self.counts.changed = True
        if orders.report_to is not None and request.status is not RequestStatus.FINISHED_ABORTED:
            self._write_report(orders.report_to, report)
        return {REPORT: asdict(report)} if orders.wants_report else None

    def take_counts(self) -> dict[str, float]:
        """What has changed since the last call, for /metrics. Called at the end of each step."""
        if self.lessons is not None:
            self.lessons.step_ended()
        if not self.counts.changed:
            return {}
        host = self.host_files.state()
        states: dict[str, float] = {
            counts.READS: host.reads,
            counts.READ_BYTES: host.read_bytes,
            counts.READ_SECONDS: host.read_s,
            counts.FAILED_READS: host.failed_reads,
            counts.EVICTIONS: host.evictions,
            key_of(counts.BYTES, "host"): host.used_bytes,
            counts.BUDGET: host.budget_bytes,
            counts.HOST_FILES: host.files,
            counts.PINS: len(self.pins.pinned),
            counts.DISK_FREE: self.counts.disk_free(),
        }
        if self.index is not None:
            states |= {counts.MEMORIES: self.index.memories, key_of(counts.BYTES, "store"): self.index.kv_bytes}
        if self.lessons is not None:
            states[key_of(counts.BYTES, "learned")] = self.lessons.learner.nbytes
        return self.counts.take_changes(states)

    def stop(self) -> None:
        """The engine ends."""
        if self.orphans is not None:
            self.orphans.stop()
        if self.lessons is not None:
            self.lessons.learner.close()

    def _count(self, request: Request, injected: int, orders: Orders | None) -> None:
        """Counts a request that is given its blocks for the first time."""
        local = self.local.pop(request.request_id, 0)
        if injected > 0:
            source = "file" if orders is not None and orders.report.file_read else "host"
        else:
            source = "engine" if local else "none"
        self.counts.add(counts.REQUESTS, source)
        self.counts.add(counts.PROMPT_TOKENS, "engine", local)
        self.counts.add(counts.PROMPT_TOKENS, "memory", injected)
        self.counts.add(counts.PROMPT_TOKENS, "computed", request.num_prompt_tokens - local - injected)

    def _fail_load(self, orders: Orders, reason: str) -> None:
        """The request's file can't be injected. If the index found it, it is not found again for a while."""
        orders.report.load_error = self._without_folder(reason)
        if self.index is not None and orders.is_auto and orders.load is not None:
            self.index.leave_out(orders.load, orders.report.load_error)

    def _marked(self, orders: Orders) -> str:
        """The manifest of the file that the request saves. If its first tokens were injected from keys and values that
        are not those of a prefill, it says so."""
        head = self.heads.get(orders.loaded_from.key) if orders.loaded_from is not None else None
        if head is None or head.is_plain:
            return orders.item
        entry = ItemManifest.model_validate_json(orders.item)
        lossy = entry.metadata.lossy or head.entry.metadata.lossy or "built on a memory of unknown origin"
        metadata = entry.metadata.model_copy(update={"lossy": lossy})
        return entry.model_copy(update={"metadata": metadata}).model_dump_json()

    def _close_save(self, orders: Orders, request: Request) -> None:
        """Names the file in the report if it was written whole; if not, or if nobody hears of it, deletes its parts."""
        assert orders.save is not None
        report, aborted = orders.report, request.status is RequestStatus.FINISHED_ABORTED
        if orders.saved and not report.save_error and not aborted:
            report.saved = orders.save
            self.counts.add(counts.SAVES)
            self.counts.add(counts.SAVED_TOKENS, number=orders.prompt_tokens)
            return
        self.counts.add(counts.FAILED_SAVES)
        report.save_error = report.save_error or (
            "The request ended before the outcome of its save was known. Generate two tokens or more, past end tokens."
        )
        for rank in range(self.ranks):
            with suppress(OSError):
                (self.folder / part_name(orders.save, rank, self.ranks)).unlink(missing_ok=True)

    def _write_report(self, name: str, report: Report) -> None:
        # A full disk, or a name that was used before, is an error for the client, who misses the file.
        with suppress(OSError), open(self.folder / report_name(name), "x") as file:
            file.write(json.dumps(asdict(report)))

    def _orders_of(self, request: Request) -> Orders | None:
        """The request's orders; None if it gave none."""
        if request.request_id not in self.orders:
            params = request.kv_transfer_params or {}
            # A server takes these from anyone: values that are not texts become names that nothing has.
            load, pin, report_to = (
                None if params.get(key) is None else str(params[key]) for key in (LOAD, PIN, REPORT_TO)
            )
            wants_save, ids = params.get(SAVE) is not None, params.get(EXPLAIN)
            if all(params.get(order) is None for order in ORDERS):
                return self._found(request, params)
            orders = Orders(load, None, pin, "", report_to, request.num_prompt_tokens)
            self.orders[request.request_id] = orders
            namespace = namespace_of(request.cache_salt)
            if ids is not None and self._is_admin(params):
                orders.report.explained = self._explained(namespace, ids)
            if load is not None:
                try:
                    _check_text_only(request)
                    check_namespace(load, namespace)
                    if self.orphans is not None:
                        self.orphans.renew(load)
                except StorageError as error:
                    orders.load, orders.report.load_error = None, str(error)
            if wants_save:
                try:
                    orders.item = self._checked_manifest(params, request, namespace)
                    lease = params.get(LEASE)
                    of_client = uuid.uuid4().hex if lease is None else lease_of(str(lease))
                    stays = self.orphans is None or (lease is None and self._is_admin(params))
                    orders.save = memory_name(namespace, NO_LEASE if stays else of_client)
                except StorageError as error:
                    orders.report.save_error = str(error)
                    self.counts.add(counts.FAILED_SAVES)
            if pin is not None and not self._may_pin(params):
                orders.report.pin_error = (
                    "This server takes no pins from requests. Pin by POST /v1/memories/ID/pin, or pin memories of an "
                    "engine in your own process."
                )
            ttl_s = params.get(PIN_TTL_S)
            if isinstance(ttl_s, int | float) and ttl_s > 0:
                orders.pin_ttl_s = float(ttl_s)
        return self.orders[request.request_id]

    def _found(self, request: Request, params: Mapping[str, Any]) -> Orders | None:
        """Orders to inject the memory that the index finds for a prompt; None if there is none, or none may be.

        A request whose logits are wanted for the whole prompt reuses nothing, of the engine's own cache either.
        """
        wanted = params.get(INJECT)
        if self.index is None or self.permissions.inject != AUTO or wanted is False:
            return None
        if request.request_id in self.looked_up or request.skip_reading_prefix_cache or not _is_text_only(request):
            return None
        assert request.prompt_token_ids is not None
        self.looked_up.add(request.request_id)
        match = self.index.find(namespace_of(request.cache_salt), request.prompt_token_ids)
        if self.lessons is not None:
            self.lessons.watch(request.request_id, request.cache_salt, request.prompt_token_ids, match.tokens)
        self.counts.add(counts.LOOKUPS, "found" if match.name else "not_found")
        if not match.name and not wanted:
            return None
        orders = Orders(match.name or None, None, None, "", None, request.num_prompt_tokens)
        orders.is_auto, orders.wants_report, orders.report.memory = True, bool(wanted), match.name
        self.orders[request.request_id] = orders
        if self.orphans is not None and match.name:
            self.orphans.renew(match.name)
        return orders

    def _explained(self, namespace: str, ids: Any) -> dict[str, Any]:
        """What the prompt of these token ids would get, if it came now."""
        if self.index is None or not isinstance(ids, list) or not all(type(number) is int for number in ids):
            return {}
        match = self.index.find(namespace, ids)
        held = any(key[0] == match.name and entry.ready for key, entry in self.host_files.entries.items())
        learning = "" if self.lessons is None else self.lessons.learner.explain(namespace, ids)
        return {**asdict(match), "in_host_memory": held, "mode": self.permissions.inject, "learning": learning}

    def _is_admin(self, params: Mapping[str, Any]) -> bool:
        key, given = self.permissions.admin_key, str(params.get(ADMIN_KEY, ""))
        return bool(key) and hmac.compare_digest(key.encode(), given.encode("utf-8", "replace"))

    def _may_pin(self, params: Mapping[str, Any]) -> bool:
        return self.permissions.pins or self._is_admin(params)

    def _checked_manifest(self, params: Mapping[str, Any], request: Request, namespace: str) -> str:
        """The manifest of a file to save. Raises StorageError if the request may not save, or not this."""
        _check_text_only(request)
        if params[SAVE] is not True:
            raise StorageError(f"{SAVE} is true, or left out: the connector names the file, and the report says how.")
        if self.permissions.saves == NOBODY:
            raise StorageError("Nobody may save here. Start the server with --saves store, or --saves anyone.")
        if self.permissions.saves != ANYONE and not self._is_admin(params):
            key, given = save_key(self.folder), str(params.get(SAVE_KEY, ""))
            if not key or not hmac.compare_digest(key.encode(), given.encode("utf-8", "replace")):
                raise StorageError(
                    f"Only clients that read the server's folder may save here, and this request lacks its {SAVE_KEY}. "
                    "Give that folder as store_dir, or start the server with --saves anyone."
                )
        if request.max_tokens < 2:
            raise StorageError(
                "The outcome of a save is known one step after the prompt's last token. Set max_tokens to 2 or more."
            )
        try:
            entry = ItemManifest.model_validate_json(str(params.get(ITEM)))
        except pydantic.ValidationError as error:
            raise StorageError(f"{ITEM} is not the manifest of a memory: {error}.") from error
        tokens = entry.metadata.tokens.token_ids
        if request.prompt_token_ids is None or tokens != tuple(request.prompt_token_ids):
            raise StorageError(f"The manifest in {ITEM} has other token ids than the prompt. Give those of the prompt.")
        if entry.metadata.namespace not in ("", namespace):
            raise StorageError(
                f"The manifest in {ITEM} is of the namespace {entry.metadata.namespace!r}, and the request is of "
                f"{namespace!r} by its cache_salt. Send the namespace as cache_salt."
            )
        return entry.model_dump_json()

    def _without_folder(self, reason: str) -> str:
        """A reason for a client, who is told names of files, but not where the server keeps them."""
        return reason.replace(f"{self.folder}/", "")

    def _prefetch(self, request: Request, names: Sequence[Any]) -> None:
        """Has files read. One that can't be is told in the report, and the others are read."""
        orders = self._orders_of(request)
        assert orders is not None
        reads = []
        for name in map(str, names[:MOST_PREFETCHED]):
            try:
                check_namespace(name, namespace_of(request.cache_salt))
                reads.append(self._read_of(*self._head_of(name)))
            except StorageError as error:
                orders.report.prefetch_error = self._without_folder(str(error))
        orders.report.prefetched = self.host_files.prefetch(reads)

    def _covered(self, orders: Orders, prompt_ids: Sequence[int] | None) -> int:
        """How many first tokens file and prompt share, without the prompt's last one, whose logits are needed."""
        assert orders.load is not None
        if prompt_ids is None:
            orders.report.load_error = "The prompt came as embeddings, and a memory is matched by ids. Send token ids."
            return 0
        try:
            key, head = self._head_of(orders.load)
        except StorageError as error:
            self._fail_load(orders, str(error))
            return 0
        refused = self.index.accepts(head) if self.index is not None and orders.is_auto else ""
        if refused:  # another file has taken its place
            self._fail_load(orders, refused)
            return 0
        if orders.loaded_from is None or orders.loaded_from.key != key:
            most = min(len(head.token_ids), len(prompt_ids) - 1)
            first_ids = head.token_ids[:most]
            orders.covered = most if tuple(prompt_ids[:most]) == first_ids else common_prefix(first_ids, prompt_ids)
            orders.loaded_from = self._read_of(key, head)
        return orders.covered

    def _read_of(self, key: FileState, head: ItemHead) -> Read:
        return Read(key, head.checksum, math.ceil(head.kv_bytes * self.rank_share))

    def _head_of(self, name: str) -> tuple[FileState, ItemHead]:
        """A file's state, and what it states, read from its header once for each state. Raises StorageError."""
        path = file_path(self.folder, name)
        key = file_state(path)
        if key not in self.heads:
            self.heads = {other: head for other, head in self.heads.items() if other[0] != name}
            self.heads[key] = read_head(path)
        return key, self.heads[key]


def _is_text_only(request: Request) -> bool:
    """Whether the keys and values of the prompt follow from its token ids alone."""
    plain_ids = request.prompt_token_ids is not None and request.prompt_embeds is None
    return plain_ids and request.lora_request is None and not request.mm_features and request.pooling_params is None


def _check_text_only(request: Request) -> None:
    """Raises StorageError if the keys and values of the prompt depend on more than its token ids."""
    if request.prompt_token_ids is not None and not _is_text_only(request):
        raise StorageError(
            "The request has a LoRA adapter, images, embeddings or a pooling task, and memories are of the model's own "
            "text prompts. Leave the memory out."
        )
