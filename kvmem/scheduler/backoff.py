"""Failed builds and moves: counted, with their reason, and retried at growing intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

FIRST_RETRY_USES = 16
"""A failed memory is retried after this many uses of any memory, then after twice as many, and so on."""


@dataclass
class Failure:
    """Failed builds or moves of one memory since its last success or the last change of its text."""

    count: int
    reason: str
    retry_at: int
    """In observed uses."""


_FAILURES = TypeAdapter(dict[str, Failure])


class RetryBackoff(dict[str, Failure]):
    """Failures by memory id, with exponential backoff."""

    def add(self, memory_id: str, error: Exception, now: int) -> None:
        """Counts a failure at `now`, in observed uses."""
        count = self[memory_id].count + 1 if memory_id in self else 1
        retry_at = now + FIRST_RETRY_USES * 2 ** (count - 1)
        self[memory_id] = Failure(count, f"{type(error).__name__}: {error}", retry_at)

    def barred(self, now: int) -> set[str]:
        """The memories that must not be retried yet."""
        return {memory_id for memory_id, failure in self.items() if failure.retry_at > now}

    def explain(self, memory_id: str) -> str:
        """How often the memory failed and why, as the end of a sentence; "" if it never failed."""
        failure = self.get(memory_id)
        return f"; failed {failure.count} times, lately: {failure.reason}" if failure else ""

    def state(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {memory_id: asdict(failure) for memory_id, failure in self.items()}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> RetryBackoff:
        """The inverse of `state`. Raises ValueError for a state that is damaged."""
        return cls(_FAILURES.validate_python(state))
