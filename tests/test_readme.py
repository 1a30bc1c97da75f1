"""The README's snippet runs as it is, and its answer is that of the same prompt as text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmem import KVCacheMemory

README = Path(__file__).parents[1] / "README.md"


def test_readme_snippet_answers_as_the_prompt_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    mem, answer = names["mem"], names["answer"]
    assert isinstance(mem, KVCacheMemory)
    assert (tmp_path / "tmp/act_mem/activation_memory.safetensors").is_file()
    assert answer.cached_tokens > 10

    model, tokenizer = mem.backend.model, mem.backend.tokenizer
    turns = [
        {"role": "system", "content": "The capital of France is Paris."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(whole, skip_special_tokens=True) == answer.text
    assert ids.shape[1] == answer.prompt_tokens
    assert "Paris" in answer.text


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150
