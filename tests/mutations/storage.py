"""Files that are not written, not read or not the same, and a slow torch beside them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from experiments.scenarios import storage
from kvmem.cache import dynamic_cache
from kvmem.storage.safetensors_file import SafetensorsFile
from tests.mutations.mutation import Mutation, Patch

KIND = "storage"
SMALL = ("scenario=storage", "scenario.gigabytes=0.01")


def _remembers(original: Any) -> Any:
    known: list[Any] = []

    def load(*given: Any) -> Any:
        if not known:
            known.append(original(*given))
        return known[0]

    return load


def _once(original: Any) -> Any:
    """Only the first file is written. The later ones are empty."""
    written: list[Any] = []

    def dump(file: Any, path: Any, items: Any) -> None:
        if not written:
            original(file, path, items)
            written.append(path)
            return
        path.touch()

    return dump


def _changed(original: Any) -> Any:
    def load(*given: Any) -> Any:
        items = original(*given)
        dynamic_cache.layers_of(items[0].kv_cache)[0][0].view(-1)[0] += 1
        return items

    return load


def _slower(times: float) -> Any:
    def make(original: Any) -> Any:
        def save(*given: Any, **named: Any) -> None:
            started = time.perf_counter()
            original(*given, **named)
            time.sleep((times - 1) * (time.perf_counter() - started) + 0.2)

        return save

    return make


def _halved(original: Any) -> Any:
    return lambda row, payload: original(row, replace(payload, dump_ratio=payload.dump_ratio / 2))


def _file(name: str, expected: str, *patches: Patch, overrides: tuple[str, ...] = ()) -> Mutation:
    return Mutation(KIND, name, expected, patches, (*SMALL, *overrides))


MUTATIONS = [
    _file("a load returns remembered tensors", "the load arm took", Patch(SafetensorsFile, "load", _remembers)),
    _file("an empty file is written", "differ from the built ones|failed", Patch(SafetensorsFile, "dump", _once)),
    _file("a number comes back changed", "differ from the built ones", Patch(SafetensorsFile, "load", _changed)),
    _file("torch.save is 3 times slower", "baseline is too slow", Patch(torch, "save", _slower(3))),
    _file("the ratio to torch is halved", "dump_ratio is stored as", Patch(storage, "judge_timings", _halved)),
    _file("three repeats of a file", "give no interval", overrides=("scenario.repeats=3",)),
]
