"""Files that are damaged, lie about what they hold, or come from a later kvmem: refused by name; nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from transformers import DynamicCache, LlamaConfig

from kvmem import KVCacheItem
from kvmem.cache.dynamic_cache import from_layers, layers_of
from kvmem.errors import DamagedFileError, FingerprintError, StorageError
from kvmem.storage import manifest, read_head
from kvmem.storage.base import for_filename
from kvmem.storage.checksums import REGION_BYTES, RegionHash
from kvmem.storage.safetensors_file import LENGTH_BYTES, NO_CHECKSUM, START, WHOLE_FILE_START
from kvmem.tiers import TieredCache
from kvmem.tiers.quantized import QuantizedFile
from tests.helpers import stored
from tests.helpers.tiny import memory_on, pairs, tiny_backend

GOLDEN = Path(__file__).parents[1] / "storage/golden/whole_file_checksum.safetensors"
TERABYTES = 10 << 40
Header = dict[str, Any]
Change = Callable[[Header], object]


def load_file(path: Path) -> list[KVCacheItem]:
    """The items of a file of any format; a quantized file has the suffix of its scheme."""
    scheme = path.suffix[1:]
    if scheme in ("int8", "int4"):
        return QuantizedFile(scheme).load(path, stored.FINGERPRINT, stored.CONFIG, stored.CPU)
    return stored.load(path)


def dump_file(path: Path, *items: KVCacheItem) -> Path:
    scheme = path.suffix[1:]
    if scheme in ("int8", "int4"):
        QuantizedFile(scheme).dump(path, items)
        return path
    return stored.dump(path, *items)


@pytest.fixture(params=["safetensors", "pickle", "int8", "int4", "older"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of each format with a small item."""
    if request.param == "older":
        return Path(shutil.copy(GOLDEN, tmp_path / "older.safetensors"))
    return dump_file(tmp_path / f"memory.{request.param}", stored.item(tokens=3))


def test_a_damaged_byte_in_every_region_is_refused(written: Path) -> None:
    """Every 23rd byte, and each of the first and last 100: length, header, checksums, manifest, tensors, seal."""
    content = written.read_bytes()
    places = sorted({*range(100), *range(0, len(content), 23), *range(len(content) - 100, len(content))})
    for at in places:
        damaged = bytearray(content)
        damaged[at] ^= 0x41
        written.write_bytes(damaged)
        with pytest.raises(StorageError, match=written.name):
            load_file(written)
    written.write_bytes(content)
    assert load_file(written)


def test_a_file_cut_off_anywhere_is_refused(written: Path) -> None:
    content = written.read_bytes()
    for end in [*range(0, 60, 7), *range(60, len(content), 61), len(content) - 1]:
        written.write_bytes(content[:end])
        with pytest.raises(StorageError, match=written.name):
            load_file(written)


def rewrite(path: Path, change: Change, content: bytes | None = None) -> None:
    """Changes the header of a safetensors file, and writes valid checksums over the result."""
    raw = path.read_bytes() if content is None else content
    body_at = LENGTH_BYTES + int.from_bytes(raw[:LENGTH_BYTES], "little")
    header, body = json.loads(raw[LENGTH_BYTES:body_at]), raw[body_at:]
    change(header)
    if "checksums_of_regions" in header["__metadata__"] and header["__metadata__"].get("region_bytes") == str(
        REGION_BYTES
    ):
        regions = RegionHash()
        regions.update(body)
        header["__metadata__"]["checksums_of_regions"] = b"".join(regions.digests()).hex()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % 64)
    older = text.startswith(WHOLE_FILE_START)
    at = LENGTH_BYTES + len(WHOLE_FILE_START if older else START)
    head = bytearray(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    head[at : at + len(NO_CHECKSUM)] = NO_CHECKSUM
    digest = xxhash.xxh3_128_hexdigest(bytes(head) + body if older else bytes(head)).encode()
    head[at : at + len(NO_CHECKSUM)] = digest
    path.write_bytes(bytes(head) + body)


def in_manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of the manifest inside a header."""

    def changed(header: Header) -> None:
        contents = json.loads(header["__metadata__"]["manifest"])
        change(contents)
        header["__metadata__"]["manifest"] = json.dumps(contents)

    return changed


def in_item(**fields: Any) -> Change:
    return in_manifest(lambda contents: contents["items"][0].update(fields))


def in_tokens(**fields: Any) -> Change:
    return in_manifest(lambda contents: contents["items"][0]["metadata"]["tokens"].update(fields))


def every_tensor(**fields: Any) -> Change:
    def changed(header: Header) -> None:
        for name, entry in header.items():
            if name != "__metadata__":
                entry.update(fields)

    return changed


LIES: dict[str, Change] = {
    "shapes of 10 TB": every_tensor(shape=[1, 2, TERABYTES // 128, 8]),
    "places 10 TB on": every_tensor(data_offsets=[TERABYTES, TERABYTES + 192]),
    "an empty tensor with huge sides": every_tensor(shape=[1, 0, 1 << 60, 1 << 60], data_offsets=[0, 0]),
    "a shape that turns tokens into heads": every_tensor(shape=[1, 3, 2, 8]),
    "a shape of other sides": every_tensor(shape=[1, 2, 8, 3]),
    "a shape with no sides": every_tensor(shape=[]),
    "negative sides": every_tensor(shape=[1, -2, -3, 8]),
    "sides that are no numbers": every_tensor(shape=[1, 2, "3", 8]),
    "sides that are true": every_tensor(shape=[True, 2, 3, 8]),
    "a place backwards": every_tensor(data_offsets=[192, 0]),
    "overlapping places": every_tensor(data_offsets=[0, 192]),
    "an unknown dtype": every_tensor(dtype="I32"),
    "half the dtype, twice the sides": every_tensor(dtype="F16", shape=[1, 2, 6, 8]),
    "half the dtype, twice the head": every_tensor(dtype="BF16", shape=[1, 2, 3, 16]),
    "a dtype that is a list": every_tensor(dtype=[]),
    "tensors that are no entries": lambda header: header.update({name: 7 for name in header if name[0] != "_"}),
    "a tensor that is missing": lambda header: header.pop("0.1.v"),
    "a tensor under another name": lambda header: header.update({"0.9.v": header.pop("0.1.v")}),
    "10^13 layers": in_item(layers=10**13),
    "minus one layer": in_item(layers=-1),
    "no layers": in_item(layers=0),
    "one layer more": in_item(layers=3),
    "10^13 tokens": in_item(cache_tokens=10**13),
    "one token less": in_item(cache_tokens=2),
    "minus three tokens": in_item(cache_tokens=-3),
    "more token ids": in_tokens(token_ids=[1, 2, 3, 4]),
    "a body behind its end": in_tokens(body_end=77),
    "a negative header": in_tokens(header_tokens=-1),
    "no items": in_manifest(lambda contents: contents.update(items=[])),
    "the item twice": in_manifest(lambda contents: contents.update(items=contents["items"] * 2)),
    "an item that is none": in_manifest(lambda contents: contents.update(items=[None])),
    "no metadata": in_item(metadata=None),
    "a manifest that is a list": lambda header: header["__metadata__"].update(manifest="[]"),
    "a manifest that is null": lambda header: header["__metadata__"].update(manifest="null"),
    "a manifest that is no text": lambda header: header["__metadata__"].update(manifest=[1]),
    "a manifest that is no JSON": lambda header: header["__metadata__"].update(manifest="{"),
    "a manifest 100,000 deep": lambda header: header["__metadata__"].update(manifest="[" * 100_000 + "]" * 100_000),
    "no manifest": lambda header: header["__metadata__"].pop("manifest"),
}
OF_REGIONS: dict[str, Change] = {
    "regions of no bytes": lambda header: header["__metadata__"].update(region_bytes="0"),
    "regions of minus one byte": lambda header: header["__metadata__"].update(region_bytes="-1"),
    "regions of x bytes": lambda header: header["__metadata__"].update(region_bytes="x"),
    "no regions": lambda header: header["__metadata__"].pop("region_bytes"),
    "checksums that are none": lambda header: header["__metadata__"].update(
        region_bytes="8", checksums_of_regions="zz"
    ),
}


@pytest.mark.parametrize("lie", [*LIES, *OF_REGIONS])
@pytest.mark.parametrize("kind", ["safetensors", "older"])
def test_a_header_that_lies_is_refused(tmp_path: Path, kind: str, lie: str) -> None:
    path = tmp_path / "memory.safetensors"
    if kind == "older":
        if lie in OF_REGIONS:
            pytest.skip("older files have no regions")
        stored.dump(path, stored.item(tokens=3))
        rewrite(path, as_older)
    else:
        stored.dump(path, stored.item(tokens=3))
    assert len(stored.load(path)) == 1, "the file is valid before the lie"
    rewrite(path, (LIES | OF_REGIONS)[lie])
    with pytest.raises(DamagedFileError, match=path.name):
        stored.load(path)
    if lie in OF_REGIONS or "manifest" in lie:
        with pytest.raises(DamagedFileError, match=path.name):
            read_head(path)


def as_older(header: Header) -> None:
    """One checksum over the whole file, as kvmem wrote it before it had regions."""
    tensors = {name: header.pop(name) for name in list(header)}
    text = tensors.pop("__metadata__")["manifest"]
    header["__metadata__"] = {"checksum": NO_CHECKSUM.decode(), "manifest": text}
    header.update(tensors)


def test_a_length_of_10_tb_is_refused_without_allocating_it(tmp_path: Path) -> None:
    path = stored.dump(tmp_path / "memory.safetensors", stored.item())
    content = path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for claimed in (TERABYTES, (1 << 64) - 1, 1 << 33):
        path.write_bytes(claimed.to_bytes(LENGTH_BYTES, "little") + content[LENGTH_BYTES:])
        os.truncate(path, TERABYTES + 4096)  # a file with a hole: it has the size and no blocks
        with pytest.raises(DamagedFileError, match=path.name):
            stored.load(path)
    path.write_bytes(content)
    os.truncate(path, TERABYTES)
    with pytest.raises(DamagedFileError, match=path.name):
        stored.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


Restate = Callable[[dict[str, Any]], object]
"""A change of a manifest."""


def dump_stating(path: Path, change: Restate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dumps an item with a manifest that `change` has changed."""
    item = stored.item(tokens=3)
    contents = json.loads(manifest.to_json([item]))
    change(contents)
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "to_json", lambda items: json.dumps(contents))
        dump_file(path, item)


@pytest.mark.parametrize(
    "change",
    [
        lambda contents: contents["items"][0].update(cache_tokens=10**13),
        lambda contents: contents["items"][0].update(layers=1),
        lambda contents: contents["items"][0]["metadata"]["tokens"].update(token_ids=[1]),
        lambda contents: contents.update(items=[]),
        lambda contents: contents.update(items=contents["items"] * 2),
        lambda contents: contents.update(items=7),
        lambda contents: contents.pop("version"),
    ],
)
def test_a_pickle_whose_manifest_lies_is_refused(
    tmp_path: Path, change: Restate, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memory.pickle"
    dump_stating(path, lambda contents: None, monkeypatch)
    assert len(stored.load(path)) == 1, "the file is valid before the lie"
    dump_stating(path, change, monkeypatch)
    with pytest.raises(DamagedFileError, match=path.name):
        stored.load(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pickle", "int8"])
def test_a_file_from_the_future_says_what_to_do(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"memory.{suffix}"
    dump_stating(path, lambda contents: contents.update(version=4, items="of a later kind"), monkeypatch)
    with pytest.raises(
        StorageError, match=r"version 4, and this kvmem reads up to version 3\. Upgrade kvmem"
    ) as raised:
        load_file(path)
    assert not isinstance(raised.value, DamagedFileError)


def quantized(path: Path, change: Restate, **tensors: torch.Tensor | None) -> None:
    """Changes manifest and tensors of a quantized file, and writes a valid checksum."""
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
        parts = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is not a dictionary
    contents = json.loads(header["manifest"])
    change(contents)
    parts = {name: tensor for name, tensor in (parts | tensors).items() if tensor is not None}
    header["manifest"] = json.dumps(contents)
    digest = xxhash.xxh3_128(header["manifest"].encode())
    for name in sorted(parts):
        digest.update(f"{name} {parts[name].dtype} {tuple(parts[name].shape)}".encode())
        digest.update(parts[name].contiguous().view(torch.uint8).numpy().data)
    safetensors.torch.save_file(parts, path, header | {"checksum": digest.hexdigest()})


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_file_that_lies_is_refused(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / f"memory.{scheme}"
    dump_file(path, stored.item(tokens=3))
    quantized(path, lambda contents: None)
    assert len(load_file(path)) == 1, "the file is valid before the lies"
    content = path.read_bytes()
    lies: list[tuple[Restate, dict[str, torch.Tensor | None]]] = [
        (lambda contents: contents["items"][0].update(cache_tokens=10**13), {}),
        (lambda contents: contents["items"][0].update(layers=0), {}),
        (lambda contents: contents["items"][0].update(layers=10**13), {}),
        (lambda contents: contents.update(items=[]), {}),
        (lambda contents: contents.update(items=contents["items"] * 2), {}),
        (lambda contents: None, {"0.k.q": None}),
        (lambda contents: None, {"0.k.s": torch.full((16, 1), float("nan"))}),
        (lambda contents: None, {"0.k.s": torch.ones(16, 1, dtype=torch.float16)}),
        (lambda contents: None, {"0.v.z": torch.ones(3, 1)}),
        (lambda contents: None, {"extra": torch.ones(1)}),
    ]
    for change, tensors in lies:
        path.write_bytes(content)
        quantized(path, change, **tensors)
        with pytest.raises(DamagedFileError, match=path.name):
            load_file(path)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", ["safetensors", "pickle", "int8"])
def test_a_value_that_is_no_number_is_not_written(
    tmp_path: Path, suffix: str, dtype: torch.dtype, value: float
) -> None:
    path = dump_file(tmp_path / f"memory.{suffix}", stored.item("good"))
    before = path.read_bytes()
    bad = stored.item("bad", dtype=dtype)
    layers_of(bad.kv_cache)[1][1].view(-1)[17] = value
    with pytest.raises(StorageError, match="item bad holds NaN or infinite values in layer 1"):
        dump_file(path, bad)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_with_nan_of_an_older_kvmem_is_refused(tmp_path: Path) -> None:
    """It does not state that all values are finite, so they are looked at."""
    path = stored.dump(tmp_path / "memory.safetensors", stored.item(tokens=3))

    def without_statement(header: Header) -> None:
        del header["__metadata__"]["finite"]

    rewrite(path, without_statement)
    assert len(stored.load(path)) == 1
    content = bytearray(path.read_bytes())
    content[-4:] = torch.tensor([float("nan")]).numpy().tobytes()
    rewrite(path, lambda header: None, bytes(content))
    with pytest.raises(DamagedFileError, match=r"memory.safetensors: item a holds NaN or infinite values in layer 1"):
        stored.load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["safetensors", "pickle"])
def test_tensors_of_another_dtype_than_the_models_are_refused(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    path = stored.dump(tmp_path / f"memory.{suffix}", stored.item(dtype=dtype))
    with pytest.raises(DamagedFileError, match=f"memory.{suffix}: item a .*{dtype}"):
        stored.load(path)


def test_layers_of_different_lengths_are_refused(tmp_path: Path) -> None:
    (keys, values), second = layers_of(stored.item().kv_cache)
    item = KVCacheItem(from_layers([(keys[..., :5, :], values), second], stored.CONFIG), stored.metadata(6, 0), "a")
    for suffix in ("safetensors", "pickle"):
        with pytest.raises(DamagedFileError, match="item a is not what its manifest says"):
            stored.load(stored.dump(tmp_path / f"memory.{suffix}", item))


@pytest.mark.parametrize("suffix", ["safetensors", "pickle"])
def test_models_whose_layers_differ_or_share_their_cache_are_not_refused(tmp_path: Path, suffix: str) -> None:
    """Gemma 3n and 4: the last layers use the keys and values of others, and some layers have larger heads."""
    sharing = LlamaConfig(**stored.CONFIG.to_dict())
    sharing.num_kv_shared_layers = 1
    first, _ = layers_of(stored.item().kv_cache)
    one_layer = KVCacheItem(from_layers([first], sharing), stored.metadata(6, 0), "shared")
    path = stored.dump(tmp_path / f"memory.{suffix}", one_layer)
    assert stored.same(stored.load(path, config=sharing)[0], one_layer)
    with pytest.raises(DamagedFileError, match="item shared is not what its manifest says"):
        stored.load(path)
    differing = LlamaConfig(**stored.CONFIG.to_dict())
    differing.global_head_dim = 16
    wide = (torch.ones(1, 1, 6, 16), torch.ones(1, 1, 6, 16))
    item = KVCacheItem(from_layers([first, wide], differing), stored.metadata(6, 0), "wide")
    assert stored.same(stored.load(stored.dump(path, item), config=differing)[0], item)
    with pytest.raises(DamagedFileError, match="item wide is not what its manifest says"):
        stored.load(path)


def test_a_prefix_on_a_server_is_not_taken_for_tensors(tmp_path: Path) -> None:
    prefix = KVCacheItem(DynamicCache(), stored.metadata(6, 0), "served")
    path = stored.dump(tmp_path / "memory.safetensors", prefix)
    with pytest.raises(StorageError, match="item served is a prefix on a server"):
        stored.load(path)


IDS = ["../../escaped", "/etc/escaped", "a/b\\c", "..", ".", "", "a\0b", "n" * 5000, "ü\n", "con"]


def test_ids_with_path_separators_name_no_files(tmp_path: Path) -> None:
    """Neither in a memory's file nor in a tier does an id become a path."""
    backend = tiny_backend("qwen3")
    memory = memory_on(backend)
    built = memory.extract(pairs(1, 300)[0][0])
    items = [KVCacheItem(built.kv_cache, built.metadata, id_) for id_ in IDS]
    memory.add(items)
    folder, tier, cold = (tmp_path / "below" / name for name in ("folder", "tier", "cold"))
    memory.dump(folder)
    assert memory.load(folder) == len(IDS)
    assert [item.kv_cache_id for item in memory.get_all()] == IDS
    tiers = TieredCache(backend, {"ram": 1 << 30, "disk": 1 << 30, "cold": 1 << 30}, tier, f"file://{cold}")
    for item in items:
        tiers.put(item, "disk")
        with tiers.use(item.kv_cache_id) as used:
            assert stored.same(used, item)
        assert tiers.move(item.kv_cache_id, "cold")
        with tiers.use(item.kv_cache_id) as used:
            assert stored.same(used, item)
    tiers.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below"]
    assert sorted(path.name for path in (tmp_path / "below").iterdir()) == ["cold", "folder", "tier"]
    assert all(path.suffix in (".safetensors", ".json", ".lock", "") for path in (tmp_path / "below").rglob("*"))


def test_a_refused_load_leaves_the_memory_and_the_file_as_they_were(tmp_path: Path) -> None:
    backend = tiny_backend("qwen3")
    memory = memory_on(backend)
    memory.add(memory.extract(pairs(1, 300)[0][0]))
    path = memory.dump(tmp_path)
    before = memory.get_all()
    content = path.read_bytes()
    for change in (every_tensor(shape=[1, 2, TERABYTES, 16]), in_item(cache_tokens=1), in_item(layers=10**12)):
        rewrite(path, change, content)
        lying = path.read_bytes()
        with pytest.raises(DamagedFileError, match=path.name):
            memory.load(tmp_path)
        assert memory.get_all() == before and path.read_bytes() == lying
    path.write_bytes(content)
    other = backend.fingerprint.model_copy(update={"weights": "other"})
    with pytest.raises(FingerprintError, match=path.name):
        for_filename(path.name).load(path, other, backend.model_config, stored.CPU)
    assert memory.load(tmp_path) == 1


def test_a_tiers_file_under_another_name_is_not_restored(tmp_path: Path) -> None:
    """Its item would be looked for in the file of its own name, which does not exist."""
    backend = tiny_backend("qwen3")
    item = memory_on(backend).extract(pairs(1, 300)[0][0])
    budgets = {"disk": 1 << 30, "cold": 1 << 30}
    tiers = TieredCache(backend, {"disk": 1 << 30}, tmp_path / "disk")
    tiers.put(item, "disk")
    tiers.close()
    (path,) = (tmp_path / "disk").glob("*.safetensors")
    path.rename(path.with_name("0" * 32 + ".safetensors"))
    again = TieredCache(backend, budgets, tmp_path / "disk", f"file://{tmp_path}/cold")
    assert again.ids() == [] and item.kv_cache_id in again.refused["0" * 32 + ".safetensors"]
    again.put(item, "cold")
    again.close()
    for file in list((tmp_path / "cold").iterdir()):
        file.rename(file.with_name("1" * 32 + file.suffix))
    once_more = TieredCache(backend, budgets, tmp_path / "disk", f"file://{tmp_path}/cold")
    assert once_more.ids() == [] and item.kv_cache_id in once_more.refused["1" * 32 + ".json"]
    once_more.close()


def test_a_manifest_in_the_cold_tier_that_lies_is_refused(tmp_path: Path) -> None:
    backend = tiny_backend("qwen3")
    item = memory_on(backend).extract(pairs(1, 300)[0][0])
    url = f"file://{tmp_path}/cold"
    tiers = TieredCache(backend, {"cold": 1 << 30}, cold=url)
    tiers.put(item, "cold")
    tiers.close()
    (path,) = (tmp_path / "cold").glob("*.json")
    whole = json.loads(path.read_text())
    metadata = whole["items"][0]["metadata"]
    for text in (
        "",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps(whole | {"version": 4}),
        *(
            json.dumps({"version": 1, "items": [whole["items"][0] | {"metadata": metadata | {"kv_bytes": kv_bytes}}]})
            for kv_bytes in (-(1 << 50), TERABYTES, 1)
        ),
    ):
        path.write_text(text)
        again = TieredCache(backend, {"cold": 1 << 30}, cold=url)
        assert again.ids() == [] and path.name in again.refused, text[:80]
        assert again.used_bytes() == {"cold": 0}
        again.close()
    path.write_text(json.dumps(whole))
    again = TieredCache(backend, {"cold": 1 << 30}, cold=url)
    with again.use(item.kv_cache_id) as used:
        assert stored.same(used, item)
    again.close()


@pytest.mark.parametrize("suffix", ["safetensors", "pickle", "int8"])
def test_a_pipe_or_a_device_is_no_file(tmp_path: Path, suffix: str) -> None:
    """A pipe keeps its reader waiting, and a device may have no end. A dump replaces them."""
    path = tmp_path / f"memory.{suffix}"
    os.mkfifo(path)
    with pytest.raises(StorageError, match=f"memory.{suffix} is a pipe"):
        load_file(path)
    assert len(load_file(dump_file(path, stored.item()))) == 1
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(StorageError, match=f"memory.{suffix} is a pipe, a socket or a device"):
        load_file(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match=f"memory.{suffix} can't be read"):
        load_file(path)


def test_quantized_files_of_two_schemes_are_told_apart(tmp_path: Path) -> None:
    path = dump_file(tmp_path / "memory.int8", stored.item())
    path.rename(tmp_path / "memory.int4")
    with pytest.raises(DamagedFileError, match=r"memory\.int4"):
        load_file(tmp_path / "memory.int4")
