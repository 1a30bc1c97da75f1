"""vLLM injects a model's memories exactly, or refuses the model by name before it loads any weights.

No engine is started: the folders have no weights, so what is not refused before they are needed fails otherwise.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from kvmem import KVCacheItem, KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache import dynamic_cache
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.connector import NO_LEASE, memory_name
from kvmem.engines.vllm.coverage import check_covered, covered_layout
from kvmem.engines.vllm.server import serve
from kvmem.errors import ModelError
from kvmem.models import prefill
from kvmem.models.loading import PACKAGED, Loaded, load_tokenizer
from kvmem.storage import SafetensorsFile
from tests.helpers.tiny import CPU, memory_on
from tests.vllm.conftest import skip_without_vllm
from tests.vllm.reading import held_by, read_by

WINDOW = 4096
REFUSED = {
    "qwen3_next": "layers of linear_attention",
    "qwen3_5_text": "layers of linear_attention",
    "jamba": "layers of linear_attention",
    "bamba": "layers of linear_attention",
    "lfm2": "layers of conv",
    "falcon_h1": "layers of hybrid",
    "mamba2": "state-space model without keys and values",
    "deepseek_v3": "multi-head latent attention",
    "minicpm3": "multi-head latent attention",
    "gemma3n_text": "layers that share the keys and values",
    "gemma4_text": "keys and values of different sizes",
    "llama4_text": "orders otherwise than transformers",
}
FIELDS = {"lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}}
NOT_MADE = ("musicgen", "musicgen_melody")
"""Their configs can't be made without those of their parts."""
COVERED = (
    "falcon",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt_oss",
    "granite",
    "llama",
    "olmo3",
    "phi3",
    "qwen3",
    "qwen3_moe",
)

SLIDING = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT, QUERY = "Names are bound by assignment, by import and by definition. " * 6, "Why?"


@pytest.mark.parametrize("kind", REFUSED)
def test_in_process_and_server_refuse_a_model_before_its_weights(kind: str, tmp_path: Path) -> None:
    skip_without_vllm()
    config: PreTrainedConfig = AutoConfig.for_model(kind, **FIELDS.get(kind, {}))
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(tmp_path)
    said = rf"does not cover {config.architectures[0]} \(model_type {kind}\): it .*{REFUSED[kind]}.*Use "
    keys = {"model_name_or_path": str(tmp_path), "max_model_len": WINDOW}
    with pytest.raises(ModelError, match=said):
        KVCacheMemory(KVCacheMemoryConfig(extractor_llm={"backend": "vllm", "config": keys}))
    with pytest.raises(SystemExit, match=said):
        serve.main(["--model", str(tmp_path), "--store", str(tmp_path / "store")])
    assert not (tmp_path / "store").exists()


def test_a_window_in_every_layer_is_refused_unless_nothing_leaves_it(tmp_path: Path) -> None:
    skip_without_vllm()
    config = AutoConfig.for_model("mistral", sliding_window=WINDOW)
    config.save_pretrained(tmp_path)
    load_tokenizer(PACKAGED).save_pretrained(tmp_path)
    check_covered(config, WINDOW)
    with pytest.raises(ModelError, match=rf"sliding window of {WINDOW} tokens in every layer.*max_model_len={WINDOW}"):
        check_covered(config, WINDOW + 1)
    store = ["--model", str(tmp_path), "--store", str(tmp_path / "store")]
    with pytest.raises(SystemExit, match=f"max_model_len={WINDOW}"):
        serve.main([*store, "--", "--max-model-len=8192"])
    with pytest.raises(SystemExit, match=r"Can't load the model"):  # not refused, and there are no weights
        serve.main([*store, "--", "--max-model-len", str(WINDOW)])


@pytest.mark.parametrize("kind", COVERED)
def test_what_keeps_keys_and_values_of_each_token_is_covered(kind: str) -> None:
    check_covered(AutoConfig.for_model(kind), WINDOW)


def test_every_causal_architecture_is_covered_or_refused_by_name() -> None:
    refused = 0
    for kind in [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING if kind.model_type not in NOT_MADE]:
        try:
            check_covered(kind(), WINDOW)
        except ModelError as error:
            assert kind.model_type in str(error)
            refused += 1
    assert refused >= len(REFUSED)


def test_what_only_a_measurement_shows_is_refused_too() -> None:
    config = AutoConfig.for_model(
        "jamba",
        **{key: SLIDING[key] for key in SLIDING if key not in ("layer_types", "head_dim")},
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
    )
    with pytest.raises(ModelError, match=r"Jamba .*keeps more than keys and values of one size"):
        covered_layout(AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture(scope="module")
def sliding() -> HFBackend:
    """A tiny Gemma 3 with a window in its first layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **SLIDING), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "embed" not in name:
                parameter.mul_(8.0)
    return HFBackend(Loaded(model, load_tokenizer(PACKAGED), "random weights of a tiny gemma3"))


def test_vllm_refuses_a_memory_without_the_tokens_that_left_a_window(sliding: HFBackend, tmp_path: Path) -> None:
    """Hugging Face drops them, and vLLM's blocks of that layer would keep what another request has left there."""
    item, name = sliding.build(TEXT), memory_name("", NO_LEASE)
    SafetensorsFile().dump(tmp_path / name, [item])
    tokens = item.metadata.token_count
    error = read_by(held_by(sliding, tmp_path), tmp_path / name)
    assert f"Layer 0 of {name} holds the last 23 of {tokens} tokens" in error and "again with vLLM" in error


def test_hugging_face_takes_a_memory_with_the_tokens_that_left_a_window(sliding: HFBackend, tmp_path: Path) -> None:
    """As vLLM saves it: whole layers. Answers, extended memories and what is stored again are as Hugging Face's own."""
    own = sliding.build(TEXT)
    cache = DynamicCache()  # without a config every layer keeps all tokens
    prefill(sliding.model, own.metadata.tokens.token_ids, cache)
    whole = dynamic_cache.from_layers(dynamic_cache.layers_of(cache), sliding.model_config)
    SafetensorsFile().dump(
        tmp_path / "activation_memory.safetensors", [KVCacheItem(whole, own.metadata, own.kv_cache_id)]
    )
    memory = memory_on(sliding)
    assert memory.load(tmp_path) == 1
    (loaded,) = memory.get_all()
    assert dynamic_cache.layers_of(loaded.kv_cache)[0][0].shape[2] == own.metadata.token_count
    prompt = sliding.split(QUERY, memory.get_cache(loaded.kv_cache_id))
    by_whole, _ = sliding.prefill(prompt, memory.get_cache(loaded.kv_cache_id))
    direct = sliding.model(input_ids=torch.tensor([prompt.ids], device=CPU), use_cache=False).logits[0, -1]
    assert len(prompt.memory_ids) == own.metadata.token_count
    torch.testing.assert_close(by_whole, direct, atol=1e-4, rtol=1e-4)
    turns = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUERY}]
    for ours, theirs in zip(
        dynamic_cache.layers_of(sliding.build(turns, base=loaded).kv_cache),
        dynamic_cache.layers_of(sliding.build(turns).kv_cache),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
