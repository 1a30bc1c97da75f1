"""What could not be built or moved: counted, named, and tried again, each time later."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FIRST_RETRY_USES = 16
"""What failed is tried again after so many uses of any memory, then after twice as many, and so on."""


@dataclass
class Failure:
    """Builds or moves of one memory that failed since one succeeded or its text changed."""

    count: int
    reason: str
    retry_at: int
    """In observed uses."""


class RetryBackoff(dict[str, Failure]):
    """RetryBackoff by memory id."""

    def add(self, memory_id: str, error: Exception, now: int) -> None:
        count = self[memory_id].count + 1 if memory_id in self else 1
        retry_at = now + FIRST_RETRY_USES * 2 ** (count - 1)
        self[memory_id] = Failure(count, f"{type(error).__name__}: {error}", retry_at)

    def barred(self, now: int) -> set[str]:
        """The memories that are not to be tried now."""
        return {memory_id for memory_id, failure in self.items() if failure.retry_at > now}

    def explain(self, memory_id: str) -> str:
        """How often and why, as the end of a sentence; "" if it never failed."""
        failure = self.get(memory_id)
        return f"; failed {failure.count} times, lately: {failure.reason}" if failure else ""

    def state(self) -> dict[str, Any]:
        """As plain values, for a file."""
        return {memory_id: asdict(failure) for memory_id, failure in self.items()}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> RetryBackoff:
        return cls({memory_id: Failure(**failure) for memory_id, failure in state.items()})
