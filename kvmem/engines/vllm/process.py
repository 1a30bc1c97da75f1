"""Several vLLM engines in one process, which vLLM itself does not keep apart.

vLLM has one variable for the KV connector of a process. The first engine sets it, every later engine finds it set and
would save and load through the first engine's connector, and any engine that is closed clears it, so the others would
stop injecting without an error. Here each engine runs with its own connector in that variable, one engine at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

LOCK = threading.Lock()
"""Held while an engine of this process starts, takes a step or is closed."""
_closing: list[tuple[LLM, KVConnectorBase_V1 | None]] = []
"""Engines that nobody refers to any more. The next holder of LOCK closes them."""


@contextmanager
def running(connector: KVConnectorBase_V1 | None) -> Iterator[None]:
    """Runs the block with `connector` as the process's KV connector, and no other engine meanwhile.

    connector: None for an engine that is to make its own, and for an engine whose workers are other processes.
    Takes about a microsecond.
    """
    with LOCK:
        _close_all()
        with _in_place(connector):
            yield


def current_connector() -> KVConnectorBase_V1 | None:
    """The process's KV connector; inside `running(None)`, the one that the started engine has made here."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    return get_kv_transfer_group() if has_kv_transfer_group() else None


def close(llm: LLM, connector: KVConnectorBase_V1 | None) -> None:
    """Closes an engine now, or before the next step of another one, if one is running.

    The garbage collector calls this at any moment, also in the middle of a step, which must keep its connector.
    """
    _closing.append((llm, connector))
    if LOCK.acquire(blocking=False):
        try:
            _close_all()
        finally:
            LOCK.release()


def _close_all() -> None:
    while _closing:
        llm, connector = _closing.pop()
        with _in_place(connector):
            llm.llm_engine.engine_core.shutdown()


@contextmanager
def _in_place(connector: KVConnectorBase_V1 | None) -> Iterator[None]:
    from vllm.distributed.kv_transfer import kv_transfer_state

    before = kv_transfer_state._KV_CONNECTOR_AGENT  # vLLM has no public way to set it
    kv_transfer_state._KV_CONNECTOR_AGENT = connector
    try:
        yield
    finally:
        if before is not None and before is not connector:
            kv_transfer_state._KV_CONNECTOR_AGENT = before
