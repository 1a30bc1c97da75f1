"""One planted fault: what it replaces while a run is measured, and what the run is expected to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SMOLLM2 = ("model=smollm2_135m",)
"""For faults of timing: a prefill of the tiny model is mostly Python, and too short."""


@dataclass(frozen=True)
class Patch:
    """Replaces `owner.name` by what `make` returns for the original."""

    owner: Any
    name: str
    make: Callable[[Any], Any]

    @contextmanager
    def applied(self) -> Iterator[None]:
        before, original = vars(self.owner)[self.name], getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.make(original))
        try:
            yield
        finally:
            setattr(self.owner, self.name, before)


@dataclass(frozen=True)
class Mutation:
    """`expected` is a regular expression for the reason that the run should give."""

    kind: str
    name: str
    expected: str
    patches: tuple[Patch, ...]
    overrides: tuple[str, ...] = ()
    arm: str = ""
    """The arm whose rows must not be ok; "" for every arm."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def first_token_with_cache(body: Callable[..., Any]) -> Callable[[Any], Any]:
    """Replaces an engine's `first_token` for calls with a cache by `body(original, backend, prompt, cache)`."""

    def make(original: Any) -> Any:
        def first_token(backend: Any, prompt: Any, kv_cache: Any = None) -> Any:
            if kv_cache is None:
                return original(backend, prompt)
            return body(original, backend, prompt, kv_cache)

        return first_token

    return make


def first_token_without_cache(body: Callable[..., Any], least: int = 100) -> Callable[[Any], Any]:
    """The same for whole prompts of at least `least` tokens: `body(original, backend, prompt)`."""

    def make(original: Any) -> Any:
        def first_token(backend: Any, prompt: Any, kv_cache: Any = None) -> Any:
            if kv_cache is None and len(prompt.ids) >= least:
                return body(original, backend, prompt)
            return original(backend, prompt, kv_cache)

        return first_token

    return make
