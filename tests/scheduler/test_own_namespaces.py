"""One scheduler, several namespaces: equal ids are different memories, and one's KV never answers for another."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmem import TextualMemoryItem
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ArgumentError, ConfigError
from kvmem.scheduler.cost_model import Costs, kv_bytes_a_token
from kvmem.scheduler.namespaces import SEPARATOR
from kvmem.scheduler.scheduler import MemScheduler
from tests.helpers.tiny import memory_on
from tests.scheduler.test_scheduler import MEMORIES, QUERY, as_text, scheduler_on


def test_a_memory_of_one_namespace_never_hits_in_another(qwen3: HFBackend, tmp_path: Path) -> None:
    """Not even with the same id and the same text."""
    with scheduler_on(qwen3, tmp_path) as scheduler:
        for namespace in (None, "acme", "Acme", "zeta"):
            first, second = (scheduler.answer(QUERY, MEMORIES[0], 8, namespace=namespace) for _ in range(2))
            assert first.cached_tokens == 0 < second.cached_tokens
            assert first.token_ids == second.token_ids == as_text(qwen3, MEMORIES[0])
        assert [(info.namespace, info.id) for info in scheduler.list()] == [
            ("", "m0"),
            ("acme", "m0"),
            ("Acme", "m0"),
            ("zeta", "m0"),
        ]
        assert [info.namespace for info in scheduler.list("acme")] == ["acme"]
        assert sorted(scheduler.items.metadata(item_id).namespace for item_id in scheduler.items.ids()) == [
            "",
            "Acme",
            "acme",
            "zeta",
        ]
    with scheduler_on(qwen3, tmp_path) as again:
        assert again.answer(QUERY, MEMORIES[0], 8, namespace="acme").cached_tokens > 50
        assert again.answer(QUERY, MEMORIES[0], 1, namespace="other").cached_tokens == 0


def test_an_edit_and_forgetting_concern_one_namespace(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    for namespace in ("a", "b"):
        scheduler.answer(QUERY, MEMORIES[0], 1, namespace=namespace)
    scheduler.update(TextualMemoryItem(id="m0", memory=MEMORIES[1].memory), namespace="a")
    assert scheduler.answer(QUERY, MEMORIES[0], 1, namespace="b").cached_tokens > 50
    assert scheduler.answer(QUERY, MEMORIES[0], 1, namespace="a").cached_tokens == 0
    scheduler.pin("m0", namespace="b")
    assert [info.is_pinned for info in scheduler.list("b")] == [True] and not scheduler.unpin("m0", namespace="a")
    assert scheduler.forget("m0", namespace="a") and not scheduler.forget("m0")
    assert [info.namespace for info in scheduler.list()] == ["b"] and "is in ram" in scheduler.explain("m0", "b")


def test_groups_of_a_namespace_name_its_memories(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3, max_builds=0)
    for _ in range(4):
        scheduler.answer(QUERY, MEMORIES[:2], 1, namespace="acme")
        scheduler.tick()
    (group,) = (info for info in scheduler.list("acme") if len(info.members) > 1)
    assert group.id == '["m0", "m1"]' and group.members == ("m0", "m1") and group.tier == "ram"
    assert scheduler.answer(QUERY, MEMORIES[:2], 1).cached_tokens == 0


def test_the_memorys_own_namespace_is_the_default(qwen3: HFBackend, tmp_path: Path) -> None:
    costs = Costs(0.001, 1e-4, 0.0, kv_bytes_a_token(qwen3))
    memory = memory_on(qwen3, namespace="acme")
    with MemScheduler(memory, "lfu", {"ram": 1 << 30, "disk": 1 << 30}, tmp_path, costs) as scheduler:
        scheduler.answer(QUERY, MEMORIES[0], 1)
        assert scheduler.answer(QUERY, MEMORIES[0], 1, namespace="acme").cached_tokens > 50
        assert scheduler.answer(QUERY, MEMORIES[0], 1, namespace="").cached_tokens == 0
        assert {info.namespace for info in scheduler.list()} == {"acme", ""}


def test_names_and_ids_that_could_be_mistaken_are_refused(qwen3: HFBackend) -> None:
    scheduler = scheduler_on(qwen3)
    for name in ("a/b", SEPARATOR, " "):
        with pytest.raises(ConfigError, match="The namespace is"):
            scheduler.observe(MEMORIES[0], QUERY, namespace=name)
    with pytest.raises(ArgumentError, match="A namespace has to be str"):
        scheduler.observe(MEMORIES[0], QUERY, namespace=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="The namespace is"):
        scheduler.list("a b")
    with pytest.raises(ArgumentError, match="separates namespaces"):
        scheduler.observe(TextualMemoryItem(id=f"acme{SEPARATOR}m0", memory="A text."), QUERY)
    with pytest.raises(ArgumentError, match="separates namespaces"):
        scheduler.forget(f"acme{SEPARATOR}m0")
    assert scheduler.list() == []
