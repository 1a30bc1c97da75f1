"""A model that changes under an open engine: old keys and values are not served for new weights, nor saved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from kvmem.cache.model_state import ModelWatch
from kvmem.engines.graph.backend import HFGraphBackend
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import KVMemError, ModelChangedError, ModelError
from kvmem.models.loading import Loaded
from tests.helpers.tiny import loaded, memory_on

TEXT = "The cellar holds four barrels of cider, and the attic holds none at all."
QUERY = "Where is the cider?"


def load_other_weights(model: PreTrainedModel) -> None:
    model.load_state_dict(loaded("tiny", seed=5).model.state_dict())


def one_training_step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()


def another_precision(model: PreTrainedModel) -> None:
    model.bfloat16()


def new_embeddings(model: PreTrainedModel) -> None:
    old = model.get_input_embeddings().weight
    model.get_input_embeddings().weight = nn.Parameter(old.detach() * 2)


def one_row(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_decoder().layers[0].self_attn.v_proj.weight[0] = 1.0


def other_memory(model: PreTrainedModel) -> None:
    weight = model.get_decoder().layers[1].mlp.up_proj.weight
    weight.data = weight.data * 1.5


CHANGES: tuple[Callable[[PreTrainedModel], None], ...] = (
    load_other_weights, one_training_step, another_precision, new_embeddings, one_row, other_memory,
)  # fmt: skip


@pytest.mark.parametrize("backend_class", [HFBackend, HFGraphBackend])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused(change, backend_class, tmp_path):
    model = loaded("tiny")
    backend = backend_class(Loaded(model.model, model.tokenizer, "random weights, seed 0"))
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    view = memory.get_cache(item.kv_cache_id)
    change(model.model)
    for use in (
        lambda: memory.get_cache(item.kv_cache_id),
        lambda: backend.generate(QUERY, view, 4),
        lambda: memory.extract(TEXT),
        lambda: memory.dump(tmp_path),
    ):
        with pytest.raises(ModelChangedError):
            use()
    assert not list(tmp_path.iterdir())


def test_the_same_weights_loaded_again_pass():
    model = loaded("tiny")
    backend = HFBackend(Loaded(model.model, model.tokenizer, "random weights, seed 0"))
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    model.model.load_state_dict({name: tensor.clone() for name, tensor in model.model.state_dict().items()})
    assert backend.generate(QUERY, memory.get_cache(item.kv_cache_id), 4).cached_tokens


def test_a_write_that_torch_does_not_count_is_found_before_a_file_is_written(tmp_path):
    model = loaded("tiny")
    memory = memory_on(HFBackend(Loaded(model.model, model.tokenizer, "random weights, seed 0")))
    memory.add(memory.extract(TEXT))
    model.model.get_decoder().layers[0].self_attn.k_proj.weight.data.mul_(2)
    with pytest.raises(ModelChangedError, match="A weight was written"):
        memory.dump(tmp_path)


def test_training_mode_is_refused_by_name_and_eval_mode_goes_on():
    model = loaded("tiny")
    backend = HFBackend(Loaded(model.model, model.tokenizer, "random weights, seed 0"))
    model.model.train()
    with pytest.raises(ModelError, match=r"model\.eval"):
        memory_on(backend).extract(TEXT)
    model.model.eval()
    memory_on(backend).extract(TEXT)


def test_autocast_is_refused_by_name():
    backend = HFBackend(loaded("tiny"))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ModelError, match="autocast"):
        memory_on(backend).extract(TEXT)
    memory_on(backend).extract(TEXT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_bit(dtype):
    backend = HFBackend(loaded("tiny"))
    expected = memory_on(backend).extract(TEXT)
    torch.set_default_dtype(dtype)
    try:
        found = memory_on(backend).extract(TEXT)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(expected.kv_cache.layers, found.kv_cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_another_attention_implementation_gives_the_same_tokens():
    model = loaded("tiny")
    backend = HFBackend(Loaded(model.model, model.tokenizer, "random weights, seed 0"))
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    model.model.set_attn_implementation("eager")
    prompt = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}]
    injected = backend.generate(QUERY, memory.get_cache(item.kv_cache_id), 8)
    assert injected.token_ids == backend.generate(prompt, None, 8).token_ids


def test_a_watch_of_an_unchanged_model_reports_nothing():
    watch = ModelWatch(loaded("tiny").model)
    assert all(watch.changed() is None for _ in range(3))
    assert issubclass(ModelChangedError, KVMemError)


@pytest.mark.parametrize("change", CHANGES)
def test_hf_graph_computes_with_the_weights_that_it_adopted(change):
    model = loaded("tiny")
    backend = HFGraphBackend(Loaded(model.model, model.tokenizer, "random weights, seed 0"))
    change(model.model)
    backend.adopt_model()
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    prompt = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}]
    injected = backend.generate(QUERY, memory.get_cache(item.kv_cache_id), 4).token_ids
    if model.model.dtype is torch.float32:  # in bf16 two ways of computing may round to another token
        assert injected == backend.generate(prompt, None, 4).token_ids
        transformers_own = HFBackend(Loaded(model.model, model.tokenizer, "the same")).generate(prompt, None, 4)
        assert injected == transformers_own.token_ids


def a_new_parameter_in_a_module_without_any(module: nn.Sequential) -> None:
    module[1].gain = nn.Parameter(torch.ones(3))


def an_equal_scalar(module: nn.Sequential) -> None:
    module[2].weight = nn.Parameter(module[2].weight.detach().clone())


def one_module_less(module: nn.Sequential) -> None:
    del module[2]


def another_order(module: nn.Sequential) -> None:
    module._modules["1"], module._modules["2"] = module._modules["2"], module._modules["1"]


def a_replaced_weight_of_another_shape(module: nn.Sequential) -> None:
    module[0].weight = nn.Parameter(torch.ones(7, 5))


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (a_new_parameter_in_a_module_without_any, "1.gain was added"),
        (an_equal_scalar, "2.weight was replaced"),
        (one_module_less, "2 was removed"),
        (another_order, "1 was replaced"),
        (a_replaced_weight_of_another_shape, "0.weight was replaced"),
    ],
)
def test_a_watch_names_what_changed(change: Callable[[nn.Sequential], None], sign: str) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.PReLU())
    watch = ModelWatch(module)
    assert watch.changed() is None
    change(module)
    assert watch.changed() == sign
