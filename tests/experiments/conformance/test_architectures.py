"""Every architecture that transformers lists is exact or refused by name, and the page of the docs says which."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from experiments.conformance import Findings, architectures, check, markdown, verdict
from experiments.conformance.checks import ESSENTIAL, STEPS, Bench, Cell, Differs
from experiments.conformance.recipes import tiny_model
from kvmem import KVCacheItem
from kvmem.cache import dynamic_cache
from kvmem.models import loading

PAGE = (Path(__file__).parents[3] / "docs/conformance.md").read_text()
QUICK = ("memory", "second query")


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return loading.load_tokenizer(loading.PACKAGED)


def listed(heading: str) -> set[str]:
    """The architectures in the page's first table under this heading."""
    section = f"\n{PAGE}\n## {heading}\n".split(f"\n## {heading}\n")[1].split("\n## ")[0].split("| Checks |")[0]
    firsts = re.findall(r"^\| ([\w., -]+) \|", section, re.M)
    return {name for first in firsts for name in first.split(", ")} - {"Architecture", "Architectures"}


@pytest.mark.parametrize("architecture", architectures())
def test_a_memory_and_a_second_query(architecture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings = check(architecture, tokenizer(), QUICK)
    same_version = f"transformers {transformers.__version__} " in PAGE
    if findings.untested:
        assert not same_version or architecture in listed("Untested"), findings.untested
        pytest.skip(findings.untested)
    outcomes = {cell.outcome for cell in findings.cells.values()}
    assert outcomes in ({"exact"}, {"refused"}), findings.cells
    if same_version and architecture in listed("Covered"):
        assert outcomes == {"exact"}, findings.cells


def test_the_page_names_every_architecture_of_its_version() -> None:
    named = listed("Covered") | listed("Failed") | listed("Refused when opened") | listed("Untested")
    assert len(listed("Covered")) >= 60
    if f"transformers {transformers.__version__} " in PAGE:
        assert named == set(architectures())


class Damaged(Bench):
    """The values of one token in one layer of its item are not what the model computed."""

    @functools.cached_property
    @torch.inference_mode()
    def item(self) -> KVCacheItem:
        item = self.memory().extract("The library opens at nine and closes at six.")
        dynamic_cache.layers_of(item.kv_cache)[0][1][..., 3, :] *= 1.05
        return item


def test_a_value_that_the_model_did_not_compute_is_found() -> None:
    with pytest.raises(Differs, match="logits differ"):
        Damaged(tiny_model("qwen3"), tokenizer()).injected()


def test_an_answer_that_does_not_depend_on_the_memory_shows_nothing() -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(Differs, match="no effect"):
        Bench(model, tokenizer()).injected()


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ({"memory": "exact", "tier": "exact"}, "exact"),
        ({"memory": "exact", "tier": "refused"}, "partly"),
        ({"memory": "refused", "tier": "refused"}, "refused"),
        ({"memory": "exact", "tier": "exact", "CacheBlend": "failed"}, "failed"),
        ({"memory": "exact", "tier": "exact", "CacheBlend": "refused"}, "exact"),
    ],
)
def test_the_verdict_on_an_architecture(outcomes: dict[str, str], expected: str) -> None:
    cells = {name: Cell(outcome, "Because.") for name, outcome in outcomes.items()}
    findings = Findings("llama", "LlamaForCausalLM", cells, 1024, 0)
    assert verdict(findings, ESSENTIAL) == expected
    page = markdown([findings, Findings("llama9", untested="KeyError: 'llama9'")], ESSENTIAL, STEPS)
    assert "| llama9 | KeyError: 'llama9' |" in page.split("## Untested")[1]
    assert ("## Failed" in page) == (expected == "failed")
