"""The costs of prefills on this machine: measured once, kept in a file, and corrected by every prefill that is seen."""

from __future__ import annotations

import json
import logging
import platform
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvmem.cache import sha256
from kvmem.engines import MeasuredBackend
from kvmem.errors import ConfigError, KVMemWarning, StorageError
from kvmem.scheduler.cost_model import CALIBRATION_TOKENS, Costs, kv_bytes_a_token
from kvmem.storage import replacing, write_all
from kvmem.tiers import LoadTimes

logger = logging.getLogger(__name__)

RECENT = 64
"""How many of the last prefills the costs are fitted to."""
REFIT_EVERY = 4
"""After so many prefills, the costs are fitted again."""
HALF_LIFE = 8.0
"""In prefills: how fast the weight of the first measurement falls."""
MIN_WEIGHT = 0.01
"""The first measurement's weight stays at least this: it decides what the prefills since then leave open."""
FILE_NAME = "calibration.json"
VERSION = 1

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sample = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(ge=0)], Seconds]
"""(tokens that a prefill computed, cached tokens before them, its seconds)."""
Load = tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0, allow_inf_nan=False)]]
"""(bytes of a load or a write, its seconds)."""


class _Saved(BaseModel):
    """What one key of the file holds."""

    model_config = ConfigDict(extra="forbid")

    first: list[Sample] = Field(min_length=1)
    recent: list[Sample] = []
    loads: dict[str, list[Load]] = {}
    writes: dict[str, list[Load]] = {}


class Calibration:
    """Seconds of prefills, as costs. Thread-safe.

    The first measurement is a few prefills of different lengths. Each prefill that is seen later counts more than
    those. The costs have the least sum of absolute errors (L1): a disturbed prefill moves them little, and a disturbed
    first measurement is soon outvoted.
    """

    def __init__(self, first: Sequence[Sample], token_bytes: int, memory_bytes: int = 0) -> None:
        """token_bytes, memory_bytes: as `kv_bytes_a_token` and `kv_bytes_a_memory` of `Costs`."""
        self.first = list(first)
        self.recent: deque[Sample] = deque(maxlen=RECENT)
        self.seen = 0
        """Prefills that were seen since the first measurement, by this process and, up to `RECENT`, those before it."""
        self._bytes = token_bytes, memory_bytes
        self._lock = threading.Lock()
        self._unfitted = 0
        """Prefills since the last fit."""
        self._costs = self._fitted()

    def prefilled(self, new: int, behind: int, seconds: float) -> None:
        """A prefill of `new` tokens behind `behind` cached ones took `seconds`. Returns at once."""
        if new < 1 or seconds <= 0:
            return
        with self._lock:
            self.recent.append((new, behind, seconds))
            self.seen += 1
            self._unfitted += 1

    @property
    def costs(self) -> Costs:
        """The costs by the prefills so far: fitted again, in milliseconds, if there are `REFIT_EVERY` new ones."""
        with self._lock:
            if self._unfitted >= REFIT_EVERY:
                self._costs, self._unfitted = self._fitted(), 0
            return self._costs

    def restore(self, recent: Sequence[Sample]) -> None:
        """Takes over prefills that an earlier process saw."""
        with self._lock:
            self.recent.extend(recent)
            self.seen = len(self.recent)
            self._costs = self._fitted()

    def samples(self) -> tuple[list[Sample], list[Sample]]:
        """The first measurement, and the last prefills."""
        with self._lock:
            return list(self.first), list(self.recent)

    def _fitted(self) -> Costs:
        token_bytes, memory_bytes = self._bytes
        if not self.recent:
            return Costs.fitted(self.first, token_bytes, kv_bytes_a_memory=memory_bytes)
        weight = max(MIN_WEIGHT, 2 ** (-len(self.recent) / HALF_LIFE))
        weights = np.array([weight] * len(self.first) + [1.0] * len(self.recent))
        return Costs.fitted_robustly([*self.first, *self.recent], weights, token_bytes, memory_bytes)


def validity(backend: MeasuredBackend) -> str:
    """What a calibration depends on, as one line: engine, attention kernel, model, dtype, device, threads, torch."""
    device = backend.compute_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    parts = (
        f"engine {backend.name}",
        f"attention {backend.attention}",
        f"model {sha256(backend.fingerprint.model_dump_json(exclude={'origin'}))[:16]}",
        f"dtype {backend.dtype}",
        f"device {name}",
        f"threads {torch.get_num_threads()}",
        f"torch {torch.__version__}",
    )
    return ", ".join(parts)


def calibrated(backend: MeasuredBackend, kept: CalibrationFile | None) -> Calibration:
    """The calibration of this engine: from the file if it holds one, otherwise measured now, and written to the file.

    Raises ConfigError if the engine is too small for three different lengths.
    """
    sizes = kv_bytes_a_token(backend), backend.fingerprint.kv_bytes(0)
    if kept is not None and kept.saved is not None:
        calibration = Calibration(kept.saved.first, *sizes)
        calibration.restore(kept.saved.recent)
        logger.info("Costs of prefills from %s: %s", kept.path, calibration.costs)
        return calibration
    lengths = [tokens for tokens in CALIBRATION_TOKENS if tokens < backend.max_tokens]
    if len(lengths) < 3:
        raise ConfigError(f"Costs need 3 measured prefills or more, and got {len(lengths)}. Measure more lengths.")
    logger.info("Calibrating: prefills of %s tokens are measured, which takes some seconds.", lengths)
    seconds = backend.measure_prefill(lengths)
    calibration = Calibration([(n, 0, s) for n, s in zip(lengths, seconds, strict=True)], *sizes)
    logger.info("Calibrated in %.1f s: %s", sum(seconds), calibration.costs)
    return calibration


class CalibrationFile:
    """Keeps calibrations and load times in a folder, each under what it is valid for (`validity`)."""

    def __init__(self, folder: Path, key: str, cold: str | None = None) -> None:
        """Reads what the folder holds for `key`. A file that is damaged counts as none, and a KVMemWarning says so.

        cold: the URL of the cold tier. Its load times are kept under a hash of it.
        """
        self.path, self._key = folder / FILE_NAME, key
        self._cold = f"cold {sha256(cold or '')[:16]}"
        self.saved: _Saved | None = None
        self._seen = -1
        """`Calibration.seen` at the last write; -1 before the first one of this process."""
        entry = self._entries(warn=True).get(key)
        if entry is None:
            return
        try:
            self.saved = _Saved.model_validate(entry)
        except ValidationError as error:
            self._warn(str(error).partition("\n")[0])

    def restore(self, loads: LoadTimes, writes: LoadTimes) -> None:
        """Takes over the loads and writes of earlier processes."""
        if self.saved is not None:
            for times, saved in ((loads, self.saved.loads), (writes, self.saved.writes)):
                times.restore({"cold" if tier == self._cold else tier: found for tier, found in saved.items()})

    def write(self, calibration: Calibration, loads: LoadTimes, writes: LoadTimes, every: int = 0) -> None:
        """Replaces what the file holds for this key, if at least `every` prefills were seen since the last time.

        If it can't be written, that is logged: it can be measured again.
        """
        if self._seen >= 0 and calibration.seen < self._seen + every:
            return
        self._seen = calibration.seen
        first, recent = calibration.samples()
        saved_loads, saved_writes = (
            {self._cold if tier == "cold" else tier: found for tier, found in times.state().items()}
            for times in (loads, writes)
        )
        entry = _Saved(first=first, recent=recent, loads=saved_loads, writes=saved_writes)
        entries = self._entries(warn=False) | {self._key: entry.model_dump(mode="json")}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as file:
                write_all(file, memoryview(json.dumps({"version": VERSION, "valid_for": entries}).encode()))
        except (OSError, StorageError) as error:
            logger.warning("The calibration was not written: %s", error)

    def _entries(self, warn: bool) -> dict[str, object]:
        try:
            document = json.loads(self.path.read_bytes())
            if document["version"] == VERSION:
                return dict(document["valid_for"])
            reason = f"its version is {document['version']}, and this kvmem reads {VERSION}"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        if warn:
            self._warn(reason)
        return {}

    def _warn(self, reason: str) -> None:
        warnings.warn(f"{self.path} can't be used: {reason}. The costs are measured again.", KVMemWarning, stacklevel=2)
