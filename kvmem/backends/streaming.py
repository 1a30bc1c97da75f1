"""Tokens as the text that each of them adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """One token of an answer as it is streamed: `text` is what it adds (empty inside a character of several tokens)."""

    id: int
    text: str


def as_text(token_ids: Iterable[int], decode: Callable[[Sequence[int]], str], max_new_tokens: int) -> Iterator[Token]:
    """Decodes all tokens so far at each one, for a token's text can depend on those before. A character that is still
    incomplete is held back, unless the answer ends there: the texts together are `decode` of all tokens."""
    ids: list[int] = []
    shown = ""
    for token in token_ids:
        ids.append(token)
        text = decode(ids)
        half = text.endswith("\N{REPLACEMENT CHARACTER}") and len(ids) < max_new_tokens
        added = "" if half else text[len(shown) :]
        shown += added
        yield Token(token, added)
