"""One thing that an audit found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`differs`: what is stored contradicts itself. Otherwise it is a remark, which does not change the result."""

    where: str
    text: str
    differs: bool = True

    def __str__(self) -> str:
        return f"{'differs' if self.differs else 'note'}: {self.where}: {self.text}"
