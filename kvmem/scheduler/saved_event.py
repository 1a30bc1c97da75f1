"""One line of the journal."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator


class SavedEvent(BaseModel):
    """A use of memories in an order, a new text of a memory, more turns of a dialogue (`grow`), that a memory was
    forgotten or expired, its pin (`pin`, `unpin`), or when it ends (`end`)."""

    kind: Literal["use", "text", "grow", "forget", "expire", "pin", "unpin", "end"]
    id: str
    query_tokens: int = Field(0, ge=0)
    behind: list[str] = []
    """The other memories of a use, in their order."""
    memory: dict[str, Any] | None = None
    """The fields of the text memory, for a new text or more turns."""

    until: float | None = Field(None, allow_inf_nan=False)
    """When a pin or a memory ends, by the clock of the day; None: never."""

    @model_validator(mode="after")
    def _has_a_text(self) -> SavedEvent:
        if (self.kind in ("text", "grow")) != (self.memory is not None):
            raise ValueError("an event of the kinds text and grow has a memory, and no other has one")
        return self
