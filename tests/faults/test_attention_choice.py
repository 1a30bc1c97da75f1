"""A model whose architecture lacks the chosen attention is refused with the one to choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvmem.errors import ModelError
from kvmem.models.loading import PACKAGED, load, load_tokenizer
from tests.helpers.tiny import CPU


def test_a_model_without_torchs_attention_names_eager(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2, vocab_size=49152)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    load_tokenizer(PACKAGED).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"attn_implementation='sdpa', .*Use attn_implementation=eager"):
        load(str(tmp_path), CPU)
    assert load(str(tmp_path), CPU, attention="eager").model.config.model_type == "bloom"
