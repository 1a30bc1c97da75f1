"""Answers under way: who sits in which buffer, and what runs there."""

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
from kvmem.engines.graph.kv_buffers import Buffer
from kvmem.engines.graph.model import ModelRunner
from kvmem.errors import CapacityError, ConfigError


@dataclass(eq=False)
class RunningSequence:
    """One answer: its first `held` tokens are a memory's, `length` counts all. Drop it, and its buffer is free."""

    cache: DynamicCache | None
    held: int
    length: int
    tail: list[KV] | None = None
    """What lay behind the held tokens, if another answer has taken the buffer meanwhile."""


@dataclass(eq=False)
class Slot:
    """A buffer, and the answer that has rows in it."""

    buffer: Buffer
    guest: weakref.ref[RunningSequence] | None = None

    @property
    def answer(self) -> RunningSequence | None:
        return self.guest() if self.guest is not None else None


class Engine:
    """One model on one device. Calls from several threads take turns; answers may go on in any order."""

    def __init__(self, model: PreTrainedModel, knobs: GraphConfig) -> None:
        self.device, self.dtype, self.knobs = model.device, model.dtype, knobs
        on_gpu = self.device.type == "cuda"
        self.pad_to = knobs.pad_to or (8 if on_gpu else 1)
        self.graph_up_to = knobs.graph_up_to if on_gpu else 0
        self.compile = knobs.compile if knobs.compile != "auto" else "all_lengths" if on_gpu else "none"
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kernel = attention.choose(knobs.attention, self.device, self.dtype, head_dim)
        self.rows = knobs.capacity_tokens + self.pad_to  # a pad may lie behind the last token
        self.fused = self._is_fused(knobs.fused)
        self.run = ModelRunner(model, self.kernel, self.rows, self.compile, self.fused)
        self.seats: list[Slot] = []  # the one used longest ago first
        self.graphs: OrderedDict[tuple[Buffer, str], Captured] = OrderedDict()
        self.warm_up = WarmUp()
        self.lock = threading.RLock()
        self.building = threading.Lock()
        with self.turn():
            self.pool = torch.cuda.graph_pool_handle() if self.graph_up_to else None
        for new in knobs.warm_tokens:
            self._warm(new)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One call at a time; what it launches goes to the model's own GPU, whichever is the thread's."""
        with self.lock, torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            yield

    @property
    def left_out(self) -> tuple[str, ...]:
        """What makes this engine fast and is not used here."""
        absent = {
            "CUDA graphs": not self.graph_up_to,
            "compiled layers": self.compile == "none",
            "fused kernels": not self.fused,
        }
        return tuple(name for name, is_absent in absent.items() if is_absent)

    def _is_fused(self, asked: bool | None) -> bool:
        reason = fused_decode.why_not(self.device)
        if asked and reason:
            raise ConfigError(f"fused=true does not run here: it {reason}. Use fused=null.")
        return asked is not False and reason is None

    def place(self, cache: DynamicCache) -> None:
        """Puts a memory at the head of a buffer, so that it is there when a query comes. A GPU is not waited for."""
        with self.turn():
            length = cache.get_seq_length()
            self._check_room(length)
            self._seat_for(cache).buffer.place(cache, length)

    def forget(self) -> None:
        """Takes no memory for being in place any more: the next one of each is copied again."""
        with self.turn():
            for seat in self.seats:
                seat.buffer.memory, seat.buffer.intact = None, 0

    def first_token(self, cache: DynamicCache | None, held: int, ids: Sequence[int]) -> int:
        """The greedy token, on the host, behind the first `held` tokens of `cache` and `ids`."""
        with self.turn():
            token, _ = self._run(self.take(RunningSequence(cache, held, held)), held, ids)
            return int(token)

    def begin(self, cache: DynamicCache | None, held: int, ids: Sequence[int]) -> tuple[torch.Tensor, RunningSequence]:
        """The logits, (vocab,), behind the first `held` tokens of `cache` and `ids`; and the answer to go on with."""
        answer = RunningSequence(cache, held, held)
        return self.extend(answer, ids), answer

    def extend(self, answer: RunningSequence, ids: Sequence[int]) -> torch.Tensor:
        """The logits, (vocab,), behind `ids`, which the answer grows by."""
        with self.turn():
            _, logits_V = self._run(self.take(answer), answer.length, ids)
            answer.length += len(ids)
            return logits_V.clone()

    def build_by_layer(
        self, cache: DynamicCache | None, held: int, ids: Sequence[int], between_layers: BetweenLayers
    ) -> list[KV]:
        """Keys and values of the first `held` tokens of `cache` and of `ids`, (1, kv_heads, tokens, head_dim) a layer.

        Calls `between_layers` before each layer, while other threads may use the engine. The build has a buffer of its
        own for its duration, as large as a slot's, and no graph; what it computes is what `begin` computes. One build
        runs at a time.
        """
        tokens = held + len(ids)
        self._check_room(tokens)

        def pause() -> None:
            self.lock.release()
            try:
                if self.device.type == "cuda":  # so that no more than one layer's work is ever queued before a request
                    torch.cuda.current_stream().synchronize()
                between_layers()
            finally:
                self.lock.acquire()

        with self.building, self.turn():
            buffer = self._new_buffer()
            if cache is not None:
                buffer.place(cache, held)
            self.run(self._inputs(held, ids).to(self.device), buffer, pause)
            return buffer.read(0, tokens)

    def greedy(self, answer: RunningSequence, token: int, most: int, ends: Collection[int]) -> list[int]:
        """At most so many greedy tokens that follow `token`, up to an end token, which is not among them.

        Each is launched before the one in front of it has been read, so the GPU need not wait for the host.
        """
        with self.turn():
            room = min(most, self.knobs.capacity_tokens - answer.length)
            step = self._decoding(answer, token)
            told = torch.empty(room, dtype=torch.long, pin_memory=self.device.type == "cuda")
            tokens: list[int] = []
            launched: list[torch.cuda.Event] = []
            for i in range(room + 1):
                if i < room:
                    told[i : i + 1].copy_(step(), non_blocking=True)
                    if self.device.type == "cuda":
                        launched.append(torch.cuda.Event())
                        launched[i].record()
                if i == 0:
                    continue
                if launched:
                    launched[i - 1].synchronize()
                if int(told[i - 1]) in ends:
                    break
                tokens.append(int(told[i - 1]))
            answer.length += min(len(tokens) + 1, room)
            if len(tokens) == room < most:
                self._check_room(answer.length + 1)
            return tokens

    def _warm(self, new: int) -> None:
        """A prefill of so many tokens, and decoding, in every buffer."""
        answers = [self.begin(None, 0, [0] * new)[1] for _ in range(self.knobs.buffers)]
        for answer in answers:
            self.extend(answer, [0])
            self.greedy(answer, 0, 1, ())

    def _decoding(self, answer: RunningSequence, token: int) -> Callable[[], torch.Tensor]:
        """Gives the next greedy token (1,) at each call, the first after `token`."""
        buffer = self.take(answer).buffer
        buffer.written_from(answer.length)
        inputs = torch.tensor([answer.length, 1, token])
        if self.graph_up_to:
            captured = self._captured("decoding", self.run.advance, buffer, inputs)
            captured.inputs.copy_(inputs)
            return lambda: captured()[0]
        on_device = inputs.to(self.device)
        return lambda: self.run.advance(on_device, buffer)[0]

    def read(self, answer: RunningSequence) -> list[KV]:
        """Copies of all of an answer's keys and values, (1, kv_heads, tokens, head_dim) a layer."""
        with self.turn():
            return self.take(answer).buffer.read(0, answer.length)

    def padded(self, tokens: int) -> int:
        """How many tokens a prefill of so many is run as."""
        return tokens if tokens == 1 or tokens > self.knobs.pad_up_to else tokens + -tokens % self.pad_to

    def take(self, answer: RunningSequence) -> Slot:
        """The seat in which all rows of `answer` lie, put there if need be."""
        for seat in self.seats:
            if seat.answer is answer:
                return self._used(seat)
        seat = self._seat_for(answer.cache)
        if answer.cache is not None:
            self._check_room(answer.held)
            seat.buffer.place(answer.cache, answer.held)
        if answer.tail is not None:
            seat.buffer.written_from(answer.held)
            seat.buffer.write(answer.held, answer.tail)
            answer.tail = None
        seat.guest = weakref.ref(answer)
        return seat

    def _run(self, seat: Slot, held: int, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_room(held + len(ids))
        inputs = self._inputs(held, ids)
        new = len(inputs) - 2
        seat.buffer.written_from(held)
        if new > self.graph_up_to:
            return self.run(inputs.to(self.device), seat.buffer)
        return self._captured(f"{new} tokens", self.run, seat.buffer, inputs)(inputs)

    def _inputs(self, held: int, ids: Sequence[int]) -> torch.Tensor:
        """What `ModelRunner` takes, padded, on the host."""
        return torch.tensor([held, len(ids), *ids, *(0 for _ in range(self.padded(len(ids)) - len(ids)))])

    def _new_buffer(self) -> Buffer:
        shape = self.run.shape
        return Buffer(len(self.run.layers), self.rows, shape.kv_heads, shape.head_dim, self.dtype, self.device)

    def _captured(self, name: str, run: Run, buffer: Buffer, inputs: torch.Tensor) -> Captured:
        key = (buffer, name)
        if key not in self.graphs:
            assert self.pool is not None
            self.graphs[key] = Captured(run, buffer, inputs.to(self.device), self.pool, self.warm_up)
            if len(self.graphs) > self.knobs.graphs:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def _seat_for(self, cache: DynamicCache | None) -> Slot:
        """A seat for a memory, or for none: its own if that is free, else a free one, else the one used longest ago,
        whose answer takes its rows along."""
        free = [seat for seat in self.seats if seat.answer is None]
        own = [seat for seat in free if cache is not None and seat.buffer.holds(cache)]
        blank = [seat for seat in free if seat.buffer.memory is None or seat.buffer.memory() is None]
        if not own and not blank and len(self.seats) < self.knobs.buffers:
            blank = [Slot(self._new_buffer())]
            self.seats.append(blank[0])
        seat = (own or blank or free or self.seats)[0]
        if (guest := seat.answer) is not None:
            guest.tail = seat.buffer.read(guest.held, guest.length)
        seat.guest = None
        return self._used(seat)

    def _used(self, seat: Slot) -> Slot:
        self.seats.remove(seat)
        self.seats.append(seat)
        return seat

    def _check_room(self, tokens: int) -> None:
        if tokens > self.knobs.capacity_tokens:
            shape = self.run.shape
            a_token = 2 * len(self.run.layers) * shape.kv_heads * shape.head_dim * self.dtype.itemsize
            raise CapacityError(
                f"{tokens} tokens do not fit a buffer of capacity_tokens={self.knobs.capacity_tokens}. Raise it "
                f"({a_token / 1e3:.0f} kB a token and buffer), or shorten the memory, the query or the answer."
            )
