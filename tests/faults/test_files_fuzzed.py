"""Loaders on mutated files: what they raise is the package's own error with the file's name, or the items are whole.

Mutations are random, from a seed that an assertion names: bits, bytes, cuts, repeated and exchanged pieces, numbers of
the header replaced by others, and pickle opcodes. Half of the mutated files get valid checksums, because a checksum
refuses a mutation before the code behind it runs. Longer: `python -m tests.faults.test_files_fuzzed SECONDS SEED`.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from kvmem.cache.dynamic_cache import layers_of, nbytes
from kvmem.errors import FingerprintError, StorageError
from kvmem.storage import read_head
from kvmem.storage.pickle_file import SEAL, SEAL_BYTES
from kvmem.storage.safetensors_file import LENGTH_BYTES
from tests.faults.test_files_damaged import GOLDEN, Header, dump_file, load_file, quantized, rewrite
from tests.helpers import stored

KINDS = ("safetensors", "older", "pickle", "memos", "int8")
SUFFIXES = {"older": "safetensors", "memos": "pickle"}
MOST_MEGABYTES = 300
"""How much memory the loads of a whole run may take beyond what was taken before. The files have a few kB."""
VALUES = [
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    1 << 31,
    1 << 40,
    10**13,
    -(1 << 63),
    1 << 64,
    0.5,
    1e308,
    True,
    None,
    "",
    "x",
    "1",
    [],
    {},
]
OPCODES = bytes(range(256))
NAMES = (
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"cos\nsystem\n",
    b"cbuiltins\nset\n",
)


def whole_file(kind: str, path: Path) -> bytes:
    if kind == "older":
        return GOLDEN.read_bytes()
    if kind == "memos":  # a pickle of kvmem without seal and manifest is as MemOS writes it
        return whole_file("pickle", path)[:-SEAL_BYTES].replace(b"kvmem_manifest", b"other_manifest")
    items = [stored.item("a", 3), stored.item("b", 2, seed=1, fingerprint=None)]
    return dump_file(path, *(items[:1] if kind == "int8" else items)).read_bytes()


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """One to four random changes of the bytes."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 1, 2, 4, 8, 50)))
        match chance.randrange(7):
            case 0:
                data[at:end] = chance.randbytes(end - at)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end] * chance.randint(1, 3)
            case 3:
                data[at:at] = chance.choice(NAMES)
            case 4:
                data[at:at] = bytes(chance.choice(OPCODES) for _ in range(chance.randint(1, 5)))
            case 5 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case _:
                data = data[: max(at, 1)] if chance.random() < 0.2 else data
    return bytes(data)


def mutate_json(value: object, chance: random.Random) -> object:
    """A copy of a JSON value in which one part is replaced, repeated or missing."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        copy = dict(value)
        match chance.randrange(8):
            case 0:
                del copy[key]
            case 1:
                copy[chance.choice(("x", "0.0.k", "__metadata__", str(key) + "0"))] = copy[key]
            case _:
                copy[key] = mutate_json(copy[key], chance)
        return copy
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        match chance.randrange(6):
            case 0:
                return value[:at]
            case 1:
                return value + value[at:]
            case _:
                return [*value[:at], mutate_json(value[at], chance), *value[at + 1 :]]
    if type(value) is int and chance.random() < 0.5:
        return value + chance.choice((-1, 1, 2, 64, -64))
    if isinstance(value, str) and value[:1] in ("{", "[") and chance.random() < 0.9:
        return json.dumps(mutate_json(json.loads(value), chance))
    return chance.choice(VALUES)


def mutate(kind: str, content: bytes, path: Path, chance: random.Random) -> None:
    """Writes a mutation of a file of this kind."""
    if chance.random() < 0.4 or kind == "memos":
        path.write_bytes(mutated_bytes(content, chance))
    elif kind == "pickle":
        body = mutated_bytes(content[:-SEAL_BYTES], chance)
        path.write_bytes(body + SEAL + xxhash.xxh3_128_digest(body))
    elif kind == "int8":

        def change_manifest(contents: dict[str, object]) -> None:
            new = mutate_json(contents, chance)
            if isinstance(new, dict):
                contents.clear()
                contents.update(new)

        path.write_bytes(content)
        quantized(path, change_manifest)
    else:

        def change(header: Header) -> None:
            new = mutate_json(header, chance)
            if isinstance(new, dict) and isinstance(new.get("__metadata__"), dict):
                header.clear()
                header.update({"__metadata__": new.pop("__metadata__")} | new)
            if other_body:  # `finite` is its writer's word, as good as its checksums
                header["__metadata__"].pop("finite", None)

        body_at = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
        other_body = chance.random() < 0.2
        body = mutated_bytes(content[body_at:], chance) if other_body else content[body_at:]
        rewrite(path, change, content[:body_at] + body)


def check(path: Path) -> str:
    """Loads the file. Returns the class of the error, or "loaded"; anything but the package's errors is raised."""
    use: Callable[[Path], object]
    outcome = "loaded"
    for use in (load_file, read_head) if path.suffix == ".safetensors" else (load_file,):
        try:
            items = use(path)
        except (StorageError, FingerprintError) as error:
            assert path.name in str(error), f"the error does not name the file: {error}"
            outcome = type(error).__name__ if use is load_file else outcome
        else:
            for item in items if use is load_file else []:
                assert nbytes(item.kv_cache) <= path.stat().st_size
                for tensor in (tensor for pair in layers_of(item.kv_cache) for tensor in pair):
                    assert tensor.dtype == torch.float32 and tensor.shape[2] == item.kv_cache.get_seq_length()
                    assert tensor.isfinite().all()
    return outcome


def fuzz(kind: str, folder: Path, seed: int, go_on: Callable[[int], bool]) -> Counter[str]:
    """Loads mutated files as long as `go_on`. Returns how often each outcome was."""
    path = folder / f"memory.{SUFFIXES.get(kind, kind)}"
    content = whole_file(kind, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    number = 0
    while go_on(number):
        mutate(kind, content, path, random.Random(f"{kind} {seed} {number}"))
        try:
            outcomes[check(path)] += 1
        except BaseException as error:
            error.add_note(f"{kind}, seed {seed}, number {number}")
            raise
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < MOST_MEGABYTES, f"{grown:.0f} MB after {kind}, seed {seed}, number {number}"
        number += 1
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_every_mutation_is_refused_by_name_or_loads_whole(tmp_path: Path, kind: str) -> None:
    outcomes = fuzz(kind, tmp_path, 0, lambda number: number < 400)
    assert outcomes["DamagedFileError"] > 100 and outcomes.total() == 400


def main(seconds: float, seed: int) -> int:
    """Fuzzes all kinds in turn, reports every finding once, and goes on behind it."""
    found: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            for kind in KINDS:
                try:
                    outcomes += Counter(
                        {
                            f"{kind} {name}": count
                            for name, count in fuzz(kind, Path(folder), seed, lambda n: n < 300).items()
                        }
                    )
                except (Exception, AssertionError) as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    finding = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
                    found[finding] += 1
                    if found[finding] == 1:
                        print(f"{finding}: {error} ({'; '.join(error.__notes__)})", flush=True)
            seed += 1
    print(dict(sorted(outcomes.items())), dict(found))
    return len(found)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
