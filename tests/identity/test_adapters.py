"""Adapters: keys and values that one adapter computed are never served to another, nor to the model without it."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from transformers import PreTrainedModel

from kvmem import KVCacheMemory
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import FingerprintError, ModelChangedError, ModelError
from kvmem.models.loading import Loaded
from tests.helpers.tiny import loaded, memory_on

TEXT = "The cellar holds four barrels of cider, and the attic holds none at all."
QUERY = "Where is the cider?"
PROMPT = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}]


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")


def with_random_values(model: torch.nn.Module, adapter: str, seed: int) -> None:
    """A new LoRA adapter has no effect, because its second matrix is zero: give it one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def two_adapters() -> peft.PeftModel:
    """A tiny Llama with the adapters `first` and `second`; `first` is active."""
    model = peft.get_peft_model(loaded("tiny_llama").model, lora(), adapter_name="first")
    model.add_adapter("second", lora())
    with_random_values(model, "first", 1)
    with_random_values(model, "second", 2)
    model.set_adapter("first")
    return model.eval()


def opened(model: torch.nn.Module) -> HFBackend:
    return HFBackend(Loaded(model, loaded("tiny_llama").tokenizer, "random weights, seed 0"))


def scale_first(model: peft.PeftModel) -> None:
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("first", 0.25)


CHANGES: dict[str, Callable[[peft.PeftModel], object]] = {
    "first": lambda model: None,
    "second": lambda model: model.set_adapter("second"),
    "both": lambda model: model.base_model.set_adapter(["first", "second"]),
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "scaled": scale_first,
    "merged": lambda model: model.merge_adapter(["first"]),
}


def test_every_state_of_the_adapters_has_a_fingerprint_of_its_own():
    found = {}
    for name, change in CHANGES.items():
        model = two_adapters()
        change(model)
        found[name] = opened(model).fingerprint.model_dump_json(exclude={"origin"})
    assert len(set(found.values())) == len(CHANGES), found


def test_disabled_adapters_are_the_model_without_them():
    model = two_adapters()
    model.base_model.disable_adapter_layers()
    assert opened(model).fingerprint.difference(opened(loaded("tiny_llama").model).fingerprint) is None


def test_a_merged_adapter_is_the_merged_model():
    merged = two_adapters()
    merged.merge_adapter(["first"])
    unloaded = two_adapters().merge_and_unload(adapter_names=["first"]).eval()
    assert opened(merged).fingerprint.difference(opened(unloaded).fingerprint) is None


def with_item(backend: HFBackend) -> tuple[KVCacheMemory, str]:
    """A memory on the backend with TEXT in it, and its id; what it answers is what the whole prompt answers."""
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    injected = backend.generate(QUERY, memory.get_cache(item.kv_cache_id), 8)
    assert injected.token_ids == backend.generate(PROMPT, None, 8).token_ids and injected.cached_tokens
    return memory, item.kv_cache_id


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "first"])
def test_a_change_under_an_open_engine_is_refused_and_can_be_adopted(name):
    model = two_adapters()
    backend = opened(model)
    memory, item_id = with_item(backend)
    view = memory.get_cache(item_id)
    CHANGES[name](model)
    for use in (
        lambda: memory.get_cache(item_id),
        lambda: backend.generate(QUERY, view, 8),
        lambda: next(backend.stream(QUERY, view, 8)),
        lambda: memory.extract(TEXT),
    ):
        with pytest.raises(ModelChangedError, match="adopt_model"):
            use()
    backend.adopt_model()
    with pytest.raises(FingerprintError, match="another model"):
        memory.get_cache(item_id)
    with pytest.raises(FingerprintError, match="another model"):
        backend.generate(QUERY, view, 8)
    with_item(backend)


def test_an_adapter_switched_off_and_on_again_passes():
    model = two_adapters()
    memory, item_id = with_item(opened(model))
    with model.disable_adapter(), pytest.raises(ModelChangedError, match="switched, scaled, merged or disabled"):
        memory.get_cache(item_id)
    memory.get_cache(item_id)


def test_an_adapter_that_is_added_to_an_open_model_is_noticed():
    model = loaded("tiny_llama").model
    memory, item_id = with_item(opened(model))
    peft.get_peft_model(model, lora()).eval()
    with pytest.raises(ModelChangedError, match="was replaced"):
        memory.get_cache(item_id)


def test_transformers_own_adapters_enabled_disabled_and_switched():
    model: PreTrainedModel = loaded("tiny_llama").model
    model.add_adapter(lora(), adapter_name="first")
    model.add_adapter(lora(), adapter_name="second")
    with_random_values(model, "first", 1)
    with_random_values(model, "second", 2)
    model.eval()
    seen = []
    for change in (
        lambda: model.set_adapter("first"),
        lambda: model.set_adapter("second"),
        lambda: model.disable_adapters(),
    ):
        change()
        seen.append(opened(model).fingerprint)
    assert all(one.difference(other) for i, one in enumerate(seen) for other in seen[:i])
    assert seen[2].difference(opened(loaded("tiny_llama").model).fingerprint) is None


def test_a_dumped_memory_of_one_adapter_is_not_loaded_by_another(tmp_path):
    model = two_adapters()
    memory, _ = with_item(opened(model))
    memory.dump(tmp_path)
    assert memory_on(opened(model)).load(tmp_path) == 1
    model.set_adapter("second")
    with pytest.raises(FingerprintError):
        memory_on(opened(model)).load(tmp_path)
    with pytest.raises(ModelChangedError):
        memory.dump(tmp_path)
    model.set_adapter("first")
    assert memory.load(tmp_path) == 1


def test_prompt_learning_is_refused_when_the_engine_opens():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(loaded("tiny_llama").model, config)
    with pytest.raises(ModelError, match="virtual tokens"):
        opened(model)
