"""Files of layers that keep more than keys and values: a version of their own, and nothing that the model would not
keep is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kvmem.cache import KVCacheItem, dynamic_cache
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import DamagedFileError, FingerprintError
from kvmem.storage import SafetensorsFile, manifest
from tests.helpers.architectures import copy_of_contents, tiny_architecture

TEXT = "Kiwis are flightless birds of New Zealand."


def dumped(backend: HFBackend, path: Path) -> KVCacheItem:
    item = backend.build(TEXT)
    backend.write(path, [item])
    return item


def manifest_of(path: Path) -> dict[str, object]:
    with safe_open(path, "pt") as file:
        stated: dict[str, object] = json.loads(file.metadata()["manifest"])
        return stated


def with_manifest(item: KVCacheItem, path: Path, monkeypatch: pytest.MonkeyPatch, **changed: object) -> None:
    """Dumps the item with other statements about it in the manifest; every checksum fits."""
    whole = manifest.to_json([item])

    def lying(_: object) -> str:
        stated = json.loads(whole)
        stated["items"][0] |= changed
        return json.dumps(stated)

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "to_json", lying)
        SafetensorsFile().dump(path, [item])


@pytest.mark.parametrize(("model_type", "version"), [("qwen3_next", 2), ("deepseek_v3", 1), ("falcon", 1)])
def test_only_files_with_other_tensors_have_the_later_version(model_type: str, version: int, tmp_path: Path):
    dumped(tiny_architecture(model_type), tmp_path / "memory.safetensors")
    stated = manifest_of(tmp_path / "memory.safetensors")
    assert stated["version"] == version
    assert ("kept" in stated["items"][0]) == (version == 2)


def test_models_without_states_have_the_fingerprint_that_they_had(qwen3: HFBackend, tmp_path: Path):
    assert "layout" not in qwen3.fingerprint.model_dump() and "layout" not in qwen3.fingerprint.model_dump_json()
    dumped(qwen3, tmp_path / "memory.safetensors")
    stated = manifest_of(tmp_path / "memory.safetensors")
    assert stated["version"] == 1 and "kept" not in stated["items"][0]


@pytest.mark.parametrize("model_type", ["qwen3_next", "nemotron_h"])
def test_any_safetensors_reader_finds_the_states(model_type: str, tmp_path: Path):
    """One of the models also has layers that keep nothing."""
    path = tmp_path / "memory.safetensors"
    item = dumped(tiny_architecture(model_type), path)
    with safe_open(path, "pt") as file:
        for layer, kept in enumerate(dynamic_cache.contents_of(item.kv_cache)):
            for name, tensor in kept.items():
                assert torch.equal(file.get_tensor(f"0.{layer}.{name}"), tensor)


@pytest.mark.parametrize(
    "changed",
    [
        {"kept": []},
        {"kept": [["k", "v"], ["k", "v"]]},
        {"kept": [["conv.0", "recurrent.0"]]},
        {"kept": [["recurrent.0", "conv.0"], ["k", "v"]]},
        {"layers": 10**12, "kept": []},
        {"layers": 3},
        {"cache_tokens": 7},
    ],
)
def test_a_manifest_that_lies_is_refused(changed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backend = tiny_architecture("qwen3_next")
    path = tmp_path / "memory.safetensors"
    with_manifest(backend.build(TEXT), path, monkeypatch, **changed)
    with pytest.raises(DamagedFileError, match=r"memory\.safetensors"):
        backend.read(path)


def test_states_of_another_shape_are_refused(tmp_path: Path):
    backend = tiny_architecture("qwen3_next")
    item = backend.build(TEXT)
    contents = copy_of_contents(item)
    contents[0]["recurrent.0"] = contents[0]["recurrent.0"][:, :2].clone()
    other = dynamic_cache.from_contents(contents, backend.model_config)
    SafetensorsFile().dump(tmp_path / "m.safetensors", [KVCacheItem(other, item.metadata)])
    with pytest.raises(DamagedFileError, match=r"recurrent\.0 of .* and shape \(1, 2, 8, 8\)"):
        backend.read(tmp_path / "m.safetensors")


def test_states_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path):
    backend = tiny_architecture("qwen3_next")
    item = backend.build(TEXT)
    contents = copy_of_contents(item)
    contents[0]["recurrent.0"][0, 0, 0, 0] = float("nan")
    broken = KVCacheItem(dynamic_cache.from_contents(contents, backend.model_config), item.metadata)
    with pytest.raises(manifest.StorageError, match="NaN or infinite values in layer 0"):
        backend.write(tmp_path / "m.safetensors", [broken])


def test_a_memory_of_another_layout_names_the_layer(tmp_path: Path):
    """As one has that an earlier transformers built, which cached expanded heads instead of latents."""
    backend = tiny_architecture("deepseek_v3")
    dumped(backend, tmp_path / "m.safetensors")
    fingerprint = backend.fingerprint
    keys, values = fingerprint.layout.layers[0]
    expanded = fingerprint.layout.model_copy(
        update={"layers": ((keys.model_copy(update={"shape": (1, 4, 1, 16)}), values), *fingerprint.layout.layers[1:])}
    )
    other = fingerprint.model_copy(update={"layout": expanded})
    with pytest.raises(FingerprintError, match="layer 0: k 1x4x1x16 float32"):
        SafetensorsFile().load(tmp_path / "m.safetensors", other, backend.model_config, backend.device)
