"""When requests arrive, and what they use: drawn from a Poisson process and Zipf's law, or read from a trace file."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from experiments.text_files import read_text_file
from kvmem.errors import ConfigError

NO_MEMORY = -1
"""The memory of a request that uses none."""


@dataclass(frozen=True, kw_only=True)
class ArrivalPlan:
    """What the arrival times and the memories of a load follow from."""

    seed: int
    memories: int
    zipf_exponent: float
    requests: int
    plain_share: float = 0.0
    """The share of requests that use no memory."""
    gaps: list[float] | None = None
    """Times between arrivals, with a mean of 1, from a trace file; None: a Poisson process."""
    used: list[int] | None = None
    """The memory of each request, from a trace file; None: drawn by Zipf's law."""

    def draw(self, rate: float) -> tuple[list[float], list[int]]:
        """The arrival of each request in seconds at `rate` requests a second, and its memory or NO_MEMORY.

        The memories are the same at every rate.
        """
        rng = np.random.default_rng(self.seed)
        popularity = 1.0 / np.arange(1, self.memories + 1) ** self.zipf_exponent
        chosen = rng.choice(self.memories, size=self.requests, p=popularity / popularity.sum())
        gaps_s = rng.exponential(1 / rate, size=self.requests)
        if self.gaps is not None:
            gaps_s = np.array(self.gaps) / rate
        if self.used is not None:
            chosen = np.array(self.used)
        plain = np.random.default_rng([self.seed, 1]).random(self.requests) < self.plain_share
        at_s = np.cumsum(gaps_s)
        return [float(at) for at in at_s], [
            NO_MEMORY if none else int(one) for none, one in zip(plain, chosen, strict=True)
        ]


def read_arrivals(path: Path, requests: int, memories: int) -> tuple[list[float], list[int] | None]:
    """The gaps between the first `requests` arrivals of a trace, with a mean of 1, and their memories if it names them.

    The file has one JSON object a line, in order of time: `timestamp` in milliseconds, and maybe `memory`, any name.
    The most frequent name is memory 0, and so on; names beyond `memories` begin again at 0. Other keys are not read, so
    the published traces of Mooncake are such files. A file whose name ends in .gz is unpacked.
    Raises ConfigError, with the line's number, for a line that is none, and for a file with fewer lines.
    """
    times: list[float] = []
    names: list[str | None] = []
    for at, raw in enumerate(_text(path).split("\n"), 1):
        if not raw.strip() or len(times) == requests + 1:
            continue
        try:
            line = json.loads(raw)
            times.append(float(line["timestamp"]))
            names.append(None if line.get("memory") is None else str(line["memory"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(
                f'{path}, line {at}: {error!r}. Each line is like {{"timestamp": 1200, "memory": "faq"}}, in ms.'
            ) from error
        if len(times) > 1 and times[-1] < times[-2]:
            raise ConfigError(f"{path}, line {at}: its timestamp is before the line above. Sort the lines by time.")
    if len(times) <= requests or times[-1] <= times[0]:
        raise ConfigError(
            f"{path} has {len(times)} arrivals, and scenario.requests={requests} needs one more than so many, over "
            "some time. Lower scenario.requests."
        )
    gaps = np.array([later - earlier for earlier, later in pairwise(times)])
    named = [name for name in names[:requests] if name is not None]
    if named and len(named) < requests:
        raise ConfigError(f"{path}: some lines have a memory and others have none. Name one in each line, or in none.")
    order = {
        name: number for number, name in enumerate(sorted(set(named), key=lambda name: (-named.count(name), name)))
    }
    used = [order[name] % memories for name in named] or None
    return [float(gap) for gap in gaps / gaps.mean()], used


def _text(path: Path) -> str:
    if path.suffix != ".gz":
        return read_text_file(path, "scenario.trace_file")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"scenario.trace_file: {path} can't be unpacked ({error}). Give a gzip file.") from error
