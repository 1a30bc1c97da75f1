"""A configuration that is wrong is refused before any model loads, with the nearest known name."""

from __future__ import annotations

import doctest
import os

import pytest

import kvmem.errors
from kvmem import KVCacheMemoryConfig
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.huggingface.config import HFConfig
from kvmem.errors import ConfigError, KVMemError, ModelError
from kvmem.merge.naive_concat import NaiveConcat
from kvmem.merge.reprefill import Reprefill
from kvmem.merge.ropeshift import RopeShift

LLM = {"backend": "huggingface", "config": {"model_name_or_path": "random:tiny"}}


def test_the_published_form_and_its_defaults():
    config = KVCacheMemoryConfig(
        extractor_llm={"backend": "huggingface", "config": {"model_name_or_path": "Qwen/Qwen3-1.7B"}},
        memory_filename="activation_memory.safetensors",
    )
    assert config.extractor_llm.config == HFConfig(model_name_or_path="Qwen/Qwen3-1.7B")
    assert config.extractor_llm.backend_class() is HFBackend
    assert (config.merge, config.template, config.separator) == (Reprefill(), "chat", "\n\n")
    assert KVCacheMemoryConfig(extractor_llm=LLM).memory_filename == "activation_memory.safetensors"


@pytest.mark.parametrize("merge", ["ropeshift", "RopeShift", RopeShift()])
def test_a_merge_is_a_strategy_or_its_name(merge):
    assert KVCacheMemoryConfig(extractor_llm=LLM, merge=merge).merge == RopeShift()
    for name in ("NaiveConcat", "naive_concat", "naiveconcat"):
        assert KVCacheMemoryConfig(extractor_llm=LLM, merge=name).merge == NaiveConcat()


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"memory_filname": "a.safetensors"}, "unknown key 'memory_filname'. Did you mean memory_filename?"),
        ({"templat": "chat"}, "Did you mean template?"),
        ({"merge": "Repreffil"}, "Unknown merge strategy 'Repreffil'. Did you mean Reprefill?"),
        ({"merge": None}, "merge is None. Give a strategy or its name"),
        ({"merge": 3}, "merge is 3. Give a strategy or its name"),
        ({"template": "chatt"}, "'chat' or 'plain'"),
        ({"memory_filename": "memory.safetensor"}, "unknown suffix '.safetensor'. Did you mean .safetensors?"),
        ({"memory_filename": ""}, "memory_filename '' has an unknown suffix ''"),
        ({"memory_filename": "memory.safetensors/"}, "is not a file below the folder that dump and load take"),
        ({"memory_filename": "a\0.safetensors"}, "is not a file below the folder that dump and load take"),
        (
            {"extractor_llm": {"backend": "hugingface", "config": {}}},
            "Unknown backend 'hugingface'. Did you mean huggingface?",
        ),
        ({"extractor_llm": {"backnd": "huggingface", "config": {}}}, "Did you mean backend?"),
        ({"extractor_llm": {**LLM, "config": {"devise": "cpu"}}}, "unknown key 'devise'. Did you mean device?"),
        ({"extractor_llm": {**LLM, "config": {"dtype": "bfloat"}}}, "Unknown dtype 'bfloat'. Did you mean bfloat16?"),
        ({"extractor_llm": {**LLM, "config": {"seed": "one"}}}, "seed"),
        ({"extractor_llm": {**LLM, "config": None}}, "Give a dictionary, or a HFConfig"),
        ({"extractor_llm": {"backend": "huggingface"}}, "config"),
    ],
)
def test_an_error_names_the_wrong_value_and_the_nearest_known_one(fields, sentence):
    with pytest.raises(ConfigError) as refused:
        KVCacheMemoryConfig(**{"extractor_llm": LLM, **fields})
    assert sentence in str(refused.value)


def test_all_findings_are_reported_at_once():
    with pytest.raises(ConfigError) as refused:
        KVCacheMemoryConfig(extractor_llm=LLM, templat="chat", separatr=" ")
    assert "Did you mean template?" in str(refused.value) and "Did you mean separator?" in str(refused.value)


def test_an_unknown_shape_or_model_names_the_way_out():
    with pytest.raises(ModelError, match=r"Unknown shape random:tinny\. Did you mean tiny\?"):
        HFBackend.open(HFConfig(model_name_or_path="random:tinny", device="cpu"))
    for near in ("smollm2-135", "smolm2-135m"):
        with pytest.raises(ModelError, match="Did you mean smollm2-135m"):
            HFBackend.open(HFConfig(model_name_or_path=near, device="cpu"))
    with pytest.raises(ModelError, match="There is no folder /no/such/folder"):
        HFBackend.open(HFConfig(model_name_or_path="/no/such/folder", device="cpu"))
    with pytest.raises(ModelError, match=r"Can't load the model './no/such/folder'.*random:<shape>"):
        HFBackend.open(HFConfig(model_name_or_path="./no/such/folder", device="cpu"))


def test_weights_that_the_machine_can_not_hold_are_refused_before_they_are_made():
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 280e9:
        pytest.skip("this machine may hold 72 billion weights")
    with pytest.raises(ModelError, match=r"The weights take 29\d GB in float32, and cpu has .*hf_ranks"):
        HFBackend.open(HFConfig(model_name_or_path="random:qwen2.5-72b", device="cpu"))


def test_every_error_is_the_packages_own():
    errors = [
        value
        for value in vars(kvmem.errors).values()
        if isinstance(value, type) and issubclass(value, Exception) and not issubclass(value, Warning)
    ]
    assert len(errors) > 8 and all(issubclass(error, KVMemError) for error in errors)


def test_the_examples_in_the_errors_docstrings():
    result = doctest.testmod(kvmem.errors)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("leads", ["../memory.safetensors", "a/../../memory.pickle", "{tmp_path}/memory.safetensors"])
def test_a_filename_that_leads_out_of_its_folder_is_refused(leads, tmp_path):
    """It must not overwrite a file outside the folder."""
    there = tmp_path / "memory.safetensors"
    there.write_text("kept")
    with pytest.raises(ConfigError, match=r"memory_filename .* is not a file below the folder .*Give a name such as"):
        KVCacheMemoryConfig(extractor_llm=LLM, memory_filename=leads.format(tmp_path=tmp_path))
    assert list(tmp_path.iterdir()) == [there] and there.read_text() == "kept"
    assert KVCacheMemoryConfig(extractor_llm=LLM, memory_filename="a/b..safetensors")
