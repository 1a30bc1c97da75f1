"""The table of sizes in the documentation is what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.cache_sizes import MODELS, size_of, table

PAGE = (Path(__file__).parents[2] / "docs" / "engines" / "huggingface.md").read_text()


def test_every_model_of_the_table_is_measured_by_the_command():
    documented = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `") and " MB |" in line]
    assert documented == list(MODELS)


@pytest.mark.parametrize("model_type", ["lfm2", "jamba", "falcon_h1"])
def test_a_row_of_the_table(model_type: str):
    row = table([size_of(model_type, MODELS[model_type])]).splitlines()[-1]
    assert row in PAGE


def test_the_latent_of_deepseek_v3_is_stored_instead_of_its_heads():
    fields = {"num_hidden_layers": 1, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}
    size = size_of("deepseek_v3", fields)
    assert size.bytes_a_token == 2 * (512 + 64) and size.bytes_a_memory == 0
    assert size.expanded_bytes_a_token == 2 * 128 * (128 + 64 + 128)
