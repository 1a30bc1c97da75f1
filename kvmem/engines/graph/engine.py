"""Running sequences: which buffer each one uses, and how it is computed."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from kvmem.cache import KV
from kvmem.engines.base import BetweenLayers
from kvmem.engines.graph import attention, fused_decode
from kvmem.engines.graph.config import GraphConfig
from kvmem.engines.graph.cuda_graphs import Captured, Run, WarmUp
from kvmem.engines.graph.families import Family, family_of
from kvmem.engines.graph.kv_buffers import Buffer
from kvmem.engines.graph.model import ModelRunner
from kvmem.errors import CapacityError, ConfigError


@dataclass(eq=False)
class RunningSequence:
    """One sequence. Its first `held` tokens are a memory's; `length` counts all. Dropping it frees its slot."""

    cache: DynamicCache | None
    held: int
    length: int
    tail: list[KV] | None = None
    """The keys and values after the held tokens, if another sequence has taken the slot meanwhile."""


@dataclass(eq=False)
class Slot:
    """A buffer, and the sequence that has rows in it."""

    buffer: Buffer
    occupant: weakref.ref[RunningSequence] | None = None

    @property
    def sequence(self) -> RunningSequence | None:
        return self.occupant() if self.occupant is not None else None


class Engine:
    """One model on one device. Calls of several threads run one at a time; sequences may continue in any order."""

    def __init__(self, model: PreTrainedModel, config: GraphConfig) -> None:
        family = family_of(model)
        self.device, self.dtype, self.config = model.device, model.dtype, config
        on_gpu = self.device.type == "cuda"
        self.pad_to = config.pad_to or (8 if on_gpu else 1)
        self.graph_up_to = config.graph_up_to if on_gpu else 0
        self.compile = config.compile if config.compile != "auto" else "all_lengths" if on_gpu else "none"
        sizes = model.config
        head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
        self.kernel = attention.choose(config.attention, self.device, self.dtype, head_dim)
        self.rows = config.capacity_tokens + self.pad_to  # padding may follow the last token
        self.fused = self._is_fused(config.fused, family)
        self.run = ModelRunner(model, family, self.kernel, self.rows, self.compile, self.fused)
        self.slots: list[Slot] = []  # least recently used first
        self.graphs: OrderedDict[tuple[Buffer, str], Captured] = OrderedDict()
        self.warm_up = WarmUp()
        self.lock = threading.RLock()
        self.building = threading.Lock()
        with self.turn():
            self.pool = torch.cuda.graph_pool_handle() if self.graph_up_to else None
        for new in config.warm_tokens:
            self._warm(new)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Holds the engine for one call, with the model's own GPU as the current device of the thread."""
        with self.lock, torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            yield

    @property
    def left_out(self) -> tuple[str, ...]:
        """The optimizations of this engine that are not used here."""
        absent = {
            "CUDA graphs": not self.graph_up_to,
            "compiled layers": self.compile == "none",
            "fused kernels": not self.fused,
        }
        return tuple(name for name, is_absent in absent.items() if is_absent)

    def _is_fused(self, requested: bool | None, family: Family) -> bool:
        reason = fused_decode.why_not(self.device, family)
        if requested and reason:
            raise ConfigError(f"fused=true does not run here: it {reason}. Use fused=null.")
        return requested is not False and reason is None

    def place(self, cache: DynamicCache) -> None:
        """Copies a memory to the head of a buffer before a query needs it. Does not wait for the GPU."""
        with self.turn():
            length = cache.get_seq_length()
            self.check_room(length)
            self.slot_for(cache).buffer.place(cache, length)

    def forget(self) -> None:
        """Treats no memory as being in place: each is copied again at its next use."""
        with self.turn():
            for slot in self.slots:
                slot.buffer.memory, slot.buffer.intact = None, 0

    def overwrite(self) -> None:
        """Overwrites the buffers that no sequence is using, so that what they held can answer nothing."""
        with self.turn():
            for slot in self.slots:
                if slot.sequence is None:
                    slot.buffer.overwrite()

    def first_token(self, cache: DynamicCache | None, held: int, ids: Sequence[int]) -> tuple[int, torch.Tensor]:
        """The greedy token after the first `held` tokens of `cache` and `ids`, on the host, and its logits, (vocab,).

        The engine's next call may overwrite the logits.
        """
        with self.turn():
            sequence = RunningSequence(cache if held else None, held, held)
            token, logits_V = self._run(self.take(sequence), held, ids)
            return int(token), logits_V

    def begin(self, cache: DynamicCache | None, held: int, ids: Sequence[int]) -> tuple[torch.Tensor, RunningSequence]:
        """The logits after the first `held` tokens of `cache` and `ids`, (vocab,), and the sequence to continue."""
        sequence = RunningSequence(cache if held else None, held, held)  # an empty cache has no tensors
        return self.extend(sequence, ids), sequence

    def extend(self, sequence: RunningSequence, ids: Sequence[int]) -> torch.Tensor:
        """Appends `ids` to the sequence. Returns the logits after them, (vocab,)."""
        with self.turn():
            _, logits_V = self._run(self.take(sequence), sequence.length, ids)
            sequence.length += len(ids)
            return logits_V.clone()

    def build_by_layer(
        self, cache: DynamicCache | None, held: int, ids: Sequence[int], between_layers: BetweenLayers
    ) -> list[KV]:
        """Keys and values of the first `held` tokens of `cache` and of `ids`: (1, kv_heads, tokens, head_dim) each.

        Calls `between_layers` before each layer, while other threads may use the engine. Allocates a buffer for the
        duration of the build, as large as a slot's, and uses no graph. Computes the same as `begin`. One build runs at
        a time.
        """
        tokens = held + len(ids)
        self.check_room(tokens)

        def pause() -> None:
            self.lock.release()
            try:
                if self.device.type == "cuda":  # so that at most one layer is queued before a request
                    torch.cuda.current_stream(self.device).synchronize()
                between_layers()
            finally:
                self.lock.acquire()

        with self.building, self.turn():
            buffer = self._new_buffer()
            if cache is not None and held:
                buffer.place(cache, held)
            self.run(self._inputs(held, ids).to(self.device), buffer, pause)
            return buffer.read(0, tokens)

    def greedy(self, sequence: RunningSequence, token: int, most: int, ends: Collection[int]) -> list[int]:
        """At most `most` greedy tokens after `token`, up to an end token, which is not included.

        Each step is launched before the token of the previous step is read, so the GPU does not wait for the host.
        Raises CapacityError, before anything is computed, if the buffer has no room for all of them.
        """
        with self.turn():
            self.check_room(sequence.length + most)
            step = self._decoding(sequence, token)
            on_host = torch.empty(most, dtype=torch.long, pin_memory=self.device.type == "cuda")
            tokens: list[int] = []
            launched: list[torch.cuda.Event] = []
            for i in range(most + 1):
                if i < most:
                    on_host[i : i + 1].copy_(step(), non_blocking=True)
                    if self.device.type == "cuda":
                        launched.append(torch.cuda.Event())
                        launched[i].record()
                if i == 0:
                    continue
                if launched:
                    launched[i - 1].synchronize()
                if int(on_host[i - 1]) in ends:
                    break
                tokens.append(int(on_host[i - 1]))
            sequence.length += min(len(tokens) + 1, most)
            return tokens

    def _warm(self, new: int) -> None:
        """Compiles and captures a prefill of `new` tokens, and decoding, in every buffer."""
        sequences = [self.begin(None, 0, [0] * new)[1] for _ in range(self.config.buffers)]
        for sequence in sequences:
            self.extend(sequence, [0])
            self.greedy(sequence, 0, 1, ())

    def _decoding(self, sequence: RunningSequence, token: int) -> Callable[[], torch.Tensor]:
        """Returns a function that gives the next greedy token, (1,), at each call, starting after `token`."""
        buffer = self.take(sequence).buffer
        buffer.written_from(sequence.length)
        inputs = torch.tensor([sequence.length, 1, token])
        if self.graph_up_to:
            captured = self._captured("decoding", self.run.advance, buffer, inputs)
            captured.inputs.copy_(inputs)
            return lambda: captured()[0]
        on_device = inputs.to(self.device)
        return lambda: self.run.advance(on_device, buffer)[0]

    def read(self, sequence: RunningSequence, tokens: int | None = None) -> list[KV]:
        """Copies of the sequence's first `tokens` keys and values (None: all), (1, kv_heads, tokens, head_dim) each."""
        with self.turn():
            return self.take(sequence).buffer.read(0, sequence.length if tokens is None else tokens)

    def padded(self, tokens: int) -> int:
        """The number of tokens to which a prefill of `tokens` is padded."""
        return tokens if tokens == 1 or tokens > self.config.pad_up_to else tokens + -tokens % self.pad_to

    def take(self, sequence: RunningSequence) -> Slot:
        """The slot that holds all rows of `sequence`, which are copied there if necessary."""
        for slot in self.slots:
            if slot.sequence is sequence:
                return self._used(slot)
        slot = self.slot_for(sequence.cache)
        if sequence.cache is not None:
            self.check_room(sequence.held)
            slot.buffer.place(sequence.cache, sequence.held)
        if sequence.tail is not None:
            slot.buffer.written_from(sequence.held)
            slot.buffer.write(sequence.held, sequence.tail)
            sequence.tail = None
        slot.occupant = weakref.ref(sequence)
        return slot

    def _run(self, slot: Slot, held: int, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self.check_room(held + len(ids))
        inputs = self._inputs(held, ids)
        new = len(inputs) - 2
        slot.buffer.written_from(held)
        if new > self.graph_up_to:
            return self.run(inputs.to(self.device), slot.buffer)
        return self._captured(f"{new} tokens", self.run, slot.buffer, inputs)(inputs)

    def _inputs(self, held: int, ids: Sequence[int]) -> torch.Tensor:
        """The inputs of `ModelRunner`, padded, on the host."""
        return torch.tensor([held, len(ids), *ids, *(0 for _ in range(self.padded(len(ids)) - len(ids)))])

    def _new_buffer(self) -> Buffer:
        shape = self.run.shape
        return Buffer(len(self.run.layers), self.rows, shape.kv_heads, shape.head_dim, self.dtype, self.device)

    def _captured(self, name: str, run: Run, buffer: Buffer, inputs: torch.Tensor) -> Captured:
        key = (buffer, name)
        if key not in self.graphs:
            assert self.pool is not None
            self.graphs[key] = Captured(run, buffer, inputs.to(self.device), self.pool, self.warm_up)
            if len(self.graphs) > self.config.graphs:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def slot_for(self, cache: DynamicCache | None) -> Slot:
        """A slot for a memory, or for none.

        Prefers a free slot that already holds the memory, then another free slot, then the least recently used one,
        whose sequence keeps a copy of its rows.
        """
        free = [slot for slot in self.slots if slot.sequence is None]
        own = [slot for slot in free if cache is not None and slot.buffer.holds(cache)]
        blank = [slot for slot in free if slot.buffer.memory is None or slot.buffer.memory() is None]
        if not own and not blank and len(self.slots) < self.config.buffers:
            blank = [Slot(self._new_buffer())]
            self.slots.append(blank[0])
        slot = (own or blank or free or self.slots)[0]
        if (occupant := slot.sequence) is not None:
            occupant.tail = slot.buffer.read(occupant.held, occupant.length)
        slot.occupant = None
        return self._used(slot)

    def _used(self, slot: Slot) -> Slot:
        self.slots.remove(slot)
        self.slots.append(slot)
        return slot

    def check_room(self, tokens: int) -> None:
        """Raises CapacityError if a sequence of so many tokens does not fit a buffer."""
        if tokens > self.config.capacity_tokens:
            shape = self.run.shape
            a_token = 2 * len(self.run.layers) * shape.kv_heads * shape.head_dim * self.dtype.itemsize
            raise CapacityError(
                f"{tokens} tokens do not fit a buffer of capacity_tokens={self.config.capacity_tokens}. Raise it "
                f"({a_token / 1e3:.0f} kB a token and buffer), or shorten the memory, the query or the answer."
            )
