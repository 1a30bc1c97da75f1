"""The same weights under other code, hooks, attributes or settings: old keys and values are not served for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvmem.cache import observing
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import FingerprintError, ModelChangedError, ModelError
from kvmem.models.loading import Loaded
from tests.helpers.tiny import loaded, memory_on

TEXT = "The cellar holds four barrels of cider, and the attic holds none at all."
QUERY = "Where is the cider?"
PROMPT = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}]


def layers(model: PreTrainedModel) -> nn.ModuleList:
    found: nn.ModuleList = model.get_decoder().layers
    return found


def a_forward_hook(model: PreTrainedModel) -> None:
    layers(model)[0].mlp.register_forward_hook(lambda module, args, output: output * 2)


def a_hook_before_a_layer(model: PreTrainedModel) -> None:
    layers(model)[1].register_forward_pre_hook(lambda module, args: (args[0] * 3 + 1, *args[1:]))


def a_hook_of_every_module(model: PreTrainedModel) -> None:
    nn.modules.module.register_module_forward_hook(lambda m, args, out: out * 2 if type(m) is nn.Linear else None)


def a_replaced_forward(model: PreTrainedModel) -> None:
    own = layers(model)[0].mlp.forward
    layers(model)[0].mlp.forward = lambda x: own(x) * 5


def another_class(model: PreTrainedModel) -> None:
    class Louder(type(layers(model)[0].mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 4

    layers(model)[0].mlp.__class__ = Louder


def another_scale_of_attention(model: PreTrainedModel) -> None:
    layers(model)[1].self_attn.scaling *= 3


def another_epsilon(model: PreTrainedModel) -> None:
    layers(model)[0].input_layernorm.variance_epsilon = 10.0


def another_activation(model: PreTrainedModel) -> None:
    layers(model)[0].mlp.act_fn = nn.ReLU()


def other_rope_frequencies(model: PreTrainedModel) -> None:
    model.get_decoder().rotary_emb.inv_freq.mul_(0.3)


def another_scale_of_rope(model: PreTrainedModel) -> None:
    model.get_decoder().rotary_emb.attention_scaling = 2.0


def another_sliding_window(model: PreTrainedModel) -> None:
    model.config.sliding_window = 4


def rope_parameters_within_the_config(model: PreTrainedModel) -> None:
    model.config.rope_parameters["rope_theta"] = 10.0


def dropout_in_one_layer(model: PreTrainedModel) -> None:
    layers(model)[0].train()
    layers(model)[0].self_attn.attention_dropout = 0.9


def attention_to_later_tokens(model: PreTrainedModel) -> None:
    layers(model)[0].self_attn.is_causal = False


def attention_of_its_own(model: PreTrainedModel) -> None:
    def three_times(*args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        return sdpa_attention_forward(*args, **kwargs)[0] * 3, None

    AttentionInterface.register("three_times", three_times)
    model.config._attn_implementation = "three_times"


CHANGES: tuple[Callable[[PreTrainedModel], None], ...] = (
    a_forward_hook, a_hook_before_a_layer, a_hook_of_every_module, a_replaced_forward, another_class,
    another_scale_of_attention, another_epsilon, another_activation, other_rope_frequencies, another_scale_of_rope,
    another_sliding_window, rope_parameters_within_the_config, dropout_in_one_layer, attention_to_later_tokens,
    attention_of_its_own,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_hook_of_every_module_stays() -> Iterator[None]:
    yield
    nn.modules.module._global_forward_hooks.clear()


def opened() -> tuple[Loaded, HFBackend]:
    model = loaded("tiny")
    return model, HFBackend(Loaded(model.model, model.tokenizer, "random weights, seed 0"))


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_weights_computed_otherwise_are_refused(change):
    model, backend = opened()
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    view = memory.get_cache(item.kv_cache_id)
    change(model.model)
    for use in (
        lambda: memory.get_cache(item.kv_cache_id),
        lambda: backend.generate(QUERY, view, 4),
        lambda: memory.extract(TEXT),
    ):
        with pytest.raises(ModelChangedError, match="after the engine was opened"):
            use()


def test_an_adopted_function_refuses_the_memories_of_the_old_one(tmp_path):
    model, backend = opened()
    memory = memory_on(backend)
    memory.add(memory.extract(TEXT))
    memory.dump(tmp_path)
    another_scale_of_attention(model.model)
    backend.adopt_model()
    with pytest.raises(FingerprintError):
        memory.get_cache(memory.get_all()[0].kv_cache_id)
    with pytest.raises(FingerprintError):
        memory_on(backend).load(tmp_path)
    new = memory_on(backend)
    item = new.extract(TEXT)
    new.add(item)
    injected = backend.generate(QUERY, new.get_cache(item.kv_cache_id), 4).token_ids
    assert injected == backend.generate(PROMPT, None, 4).token_ids


def test_a_file_of_a_model_with_hooks_does_not_fit_the_model_without(tmp_path):
    model = loaded("tiny")
    a_forward_hook(model.model)
    steered = memory_on(HFBackend(model))
    steered.add(steered.extract(TEXT))
    steered.dump(tmp_path)
    _, plain = opened()
    with pytest.raises(FingerprintError, match="code of its own"):
        memory_on(plain).load(tmp_path)
    memory_on(HFBackend(model)).load(tmp_path)  # the same hook


def test_what_changes_nothing_passes():
    """Hooks that only look, and attributes that were changed back."""
    model, backend = opened()
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    seen: list[int] = []
    looking = layers(model.model)[0].register_forward_hook(lambda *_: seen.append(0))
    assert backend.generate(QUERY, memory.get_cache(item.kv_cache_id), 2).cached_tokens
    looking.remove()
    layers(model.model)[0].mlp.hidden_size += 1
    layers(model.model)[0].mlp.hidden_size -= 1
    assert backend.generate(QUERY, memory.get_cache(item.kv_cache_id), 2).cached_tokens


def test_an_observing_hook_is_called_by_answers_only():
    model, backend = opened()
    calls: list[int] = []
    layers(model.model)[0].register_forward_hook(observing(lambda *_: calls.append(0)))
    backend.generate(QUERY, None, 1)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change", [a_forward_hook, a_replaced_forward, another_scale_of_attention, another_epsilon, another_activation]
)
def test_hf_graph_refuses_a_model_that_it_would_compute_otherwise(change):
    model = loaded("tiny")
    change(model.model)
    with pytest.raises(ModelError, match="computes the layers itself"):
        HFGraphBackend(model)


def test_hf_graph_keeps_the_code_that_it_was_opened_with():
    model = loaded("tiny")
    backend = HFGraphBackend(model)
    memory = memory_on(backend)
    items = [memory.extract(TEXT), memory.extract("The boat is green.")]
    memory.add(items)
    expected = backend.generate(PROMPT, None, 4).token_ids
    a_forward_hook(model.model)
    assert backend.generate(QUERY, memory.get_cache(items[0].kv_cache_id), 4).token_ids == expected
    with pytest.raises(ModelChangedError):  # transformers computes merges
        memory.get_cache([item.kv_cache_id for item in items])
