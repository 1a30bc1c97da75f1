"""A model is covered or refused, by name and with the way out, when it is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kvmem.engines.huggingface import HFBackend
from kvmem.errors import MergeError, ModelError, PromptError
from kvmem.merge import strategy
from kvmem.models import NO_MAXIMUM, Loaded, load, loading
from kvmem.prompt import TokenizedPrompt
from tests.helpers.tiny import CPU, greedy_by_transformers, memory_on

VOCABULARY = 49152
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
BERT = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
TEXT = "The library opens at nine and closes at six. A late book costs ten cents a day."


def opened(model: PreTrainedModel) -> HFBackend:
    return HFBackend(Loaded(model.eval(), loading.load_tokenizer(loading.PACKAGED), "random weights"))


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    loading.load_tokenizer(loading.PACKAGED).save_pretrained(folder)
    return str(folder)


def bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=VOCABULARY))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100)), "past_key_values"),
        (
            lambda: Mamba2ForCausalLM(
                Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, n_groups=1, num_hidden_layers=2, vocab_size=100)
            ),
            "past_key_values",
        ),
        (lambda: RwkvForCausalLM(RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100)), "past_key_values"),
        (
            lambda: RecurrentGemmaForCausalLM(
                RecurrentGemmaConfig(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=100
                )
            ),
            "keeps no keys and values of a text in layer 0",
        ),
        (lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA)), "has no language head"),
        (lambda: LlamaModel(LlamaConfig(**LLAMA)), "has no language head"),
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, vocab_size=100)),
            "is an encoder-decoder",
        ),
        (lambda: BertLMHeadModel(BertConfig(**BERT)), "is not causal"),
    ],
    ids=["mamba", "mamba2", "rwkv", "recurrent_gemma", "classifier", "headless", "encoder_decoder", "encoder"],
)
def test_other_models_are_refused_by_name_when_opened(model, reason: str) -> None:
    tiny = model()
    with pytest.raises(ModelError) as refused:
        opened(tiny)
    assert type(tiny).__name__ in str(refused.value) and reason in str(refused.value)
    assert str(refused.value).endswith(".")


def test_a_decoder_of_the_same_class_as_an_encoder_is_covered() -> None:
    assert opened(BertLMHeadModel(BertConfig(is_decoder=True, **BERT))).max_tokens == 512


def test_an_encoder_decoder_is_refused_by_name_when_loaded(tmp_path: Path) -> None:
    model = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, vocab_size=VOCABULARY))
    with pytest.raises(
        ModelError, match=r"is a t5 \(T5ForConditionalGeneration\), of which transformers has no causal"
    ):
        load(saved(model, tmp_path), CPU)


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaModel])
def test_a_model_that_was_saved_without_a_head_is_refused(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no weights for lm_head\.weight"):
        load(saved(kind(LlamaConfig(**LLAMA)), tmp_path), CPU)


def test_a_head_that_shares_the_embeddings_is_not_missed(tmp_path: Path) -> None:
    folder = saved(LlamaModel(LlamaConfig(tie_word_embeddings=True, **LLAMA)), tmp_path)
    assert type(load(folder, CPU).model) is LlamaForCausalLM


def test_a_model_that_this_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = saved(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "llama_of_the_future"}))
    with pytest.raises(ModelError, match=r"llama_of_the_future.*Upgrade transformers"):
        load(folder, CPU)


def exact(backend: HFBackend) -> None:
    memory = memory_on(backend)
    item = memory.extract(TEXT)
    memory.add(item)
    cache = memory.get_cache(item.kv_cache_id)
    prompt = backend.split("When does it open?", cache)
    assert len(prompt.memory_ids) == item.metadata.token_count
    answer = backend.generate("When does it open?", cache, max_new_tokens=8)
    assert list(answer.token_ids) == greedy_by_transformers(backend, prompt.ids, 8)


def test_alibi_without_a_maximum_has_none() -> None:
    backend = opened(bloom())
    assert backend.max_tokens == NO_MAXIMUM
    exact(backend)


def test_a_merge_that_alibi_has_no_mask_for_is_exact_or_refused() -> None:
    backend = opened(bloom())
    for merge in ("Reprefill", "NaiveConcat"):
        memory = memory_on(backend, merge=strategy(merge))
        items = memory.extract(["The library opens at nine.", "The museum is closed on Mondays."])
        memory.add(items)
        try:
            view = memory.get_cache([item.kv_cache_id for item in items])
        except MergeError as refused:
            assert merge != "Reprefill" and "bloom" in str(refused) and "Reprefill" in str(refused)
        else:
            assert view.get_seq_length() == len(view.tokens.token_ids)


def test_positions_that_begin_behind_the_padding_token_are_fewer() -> None:
    config = RobertaConfig(is_decoder=True, max_position_embeddings=66, **{**BERT, "pad_token_id": 1})
    backend = opened(RobertaForCausalLM(config))
    assert backend.max_tokens == 64
    backend.prefill(TokenizedPrompt((), tuple(range(100, 164))))
    with pytest.raises(PromptError, match="the model's 64 positions"):
        memory_on(backend).extract("word " * 70)


def test_the_maximum_of_mpt_is_kept() -> None:
    model = MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=128, vocab_size=VOCABULARY))
    backend = opened(model)
    assert backend.max_tokens == 128
    exact(backend)
    with pytest.raises(PromptError, match="the model's 128 positions"):
        memory_on(backend).extract("word " * 200)


def test_the_language_model_inside_a_vision_language_model_takes_text(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config={**LLAMA, "head_dim": 16, "sliding_window": 24}, vision_config=vision)
    torch.manual_seed(0)
    folder = saved(Gemma3ForConditionalGeneration(config), tmp_path)
    model = load(folder, CPU).model
    assert type(model) is Gemma3ForConditionalGeneration
    backend = opened(model)
    assert backend.fingerprint.layers == 2 and backend.model_config.model_type == "gemma3_text"
    exact(backend)


@pytest.mark.parametrize(
    "model",
    [bloom, lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY))],
    ids=["bloom", "gpt2"],
)
def test_a_build_pauses_before_each_layer_whatever_the_list_of_layers_is_called(model) -> None:
    backend, pauses = opened(model()), []
    backend.build(TEXT, between_layers=lambda: pauses.append(1))
    assert len(pauses) == 2
