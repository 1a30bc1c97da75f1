"""What a stored item says of itself."""

from __future__ import annotations

from kvmem.backends.hf import HFBackend
from tests.tiny import memory_on


def test_an_item_says_what_it_is_in_one_line(qwen3: HFBackend) -> None:
    memory = memory_on(qwen3)
    short, long = memory.extract("Open at 9."), memory.extract("Open at 9.\n" * 50)
    assert repr(short).endswith("'Open at 9.')") and repr(short.kv_cache_id) in repr(short)
    assert f"{long.metadata.token_count} tokens" in repr(long) and repr(long).endswith("…')")
    assert "\n" not in repr(long) and len(repr(long)) < 150
