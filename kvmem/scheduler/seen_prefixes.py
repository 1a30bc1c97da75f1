"""Counts how often the prefixes of prompts come, in bounded memory, without keeping their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

MOST_PREFIXES = 1 << 17
"""How many prefixes are counted at once, at about 300 bytes each. Those that came least recently are left out."""
HALF_LIFE = 4096.0
"""In prompts: after so many, a count is half of what it was."""


@dataclass(frozen=True)
class SeenPrefix:
    """A prefix of a prompt."""

    id: str
    """32 hexadecimal digits, which stand for its namespace and its tokens."""
    tokens: int
    count: float
    """How often it came, this time included, decayed."""


class SeenPrefixes:
    """Counts each prompt's first `step_tokens` tokens, its first 2 x `step_tokens`, and so on, by hashes.

    A hash covers the namespace and all tokens of the prefix, so prefixes of two namespaces are never the same, and an
    edited text is another prefix from the edited token on.
    """

    def __init__(self, step_tokens: int, most: int = MOST_PREFIXES, half_life: float = HALF_LIFE) -> None:
        self.step_tokens, self.most, self.half_life = step_tokens, most, half_life
        self.counts: OrderedDict[bytes, tuple[float, int]] = OrderedDict()
        """By hash, a count and the prompt's number when it was counted. Least recent first."""
        self.now = 0
        """How many prompts were counted."""

    def see(self, namespace: str, token_ids: Sequence[int]) -> list[SeenPrefix]:
        """Counts a prompt's prefixes. Returns them, shortest first."""
        self.now += 1
        keys = self._keys(namespace, token_ids)
        counts = [self._count(key) + 1.0 for key in keys]
        for key, count in zip(reversed(keys), reversed(counts), strict=True):  # of one prompt the longest leave first
            self.counts[key] = count, self.now
            self.counts.move_to_end(key)
        while len(self.counts) > self.most:
            self.counts.popitem(last=False)
        return self._found(keys, counts)

    def look(self, namespace: str, token_ids: Sequence[int]) -> list[SeenPrefix]:
        """A prompt's prefixes that came before, shortest first. Counts nothing."""
        keys = [key for key in self._keys(namespace, token_ids) if key in self.counts]
        return self._found(keys, [self._count(key) for key in keys])

    def id_of(self, namespace: str, token_ids: Sequence[int]) -> str:
        """The id of a prefix whose length is a multiple of `step_tokens`; "" for a shorter one than that."""
        keys = self._keys(namespace, token_ids)
        return keys[-1].hex() if keys else ""

    def _count(self, key: bytes) -> float:
        count, at = self.counts.get(key, (0.0, self.now))
        return float(count * 2 ** ((at - self.now) / self.half_life))

    def _found(self, keys: Sequence[bytes], counts: Sequence[float]) -> list[SeenPrefix]:
        step = self.step_tokens
        return [
            SeenPrefix(key.hex(), step * number, count)
            for number, (key, count) in enumerate(zip(keys, counts, strict=True), 1)
        ]

    def _keys(self, namespace: str, token_ids: Sequence[int]) -> list[bytes]:
        data = memoryview(np.asarray(token_ids, np.int32).tobytes())
        state, step = xxhash.xxh3_128(f"{len(namespace)} {namespace}\n".encode("utf-8", "surrogatepass")), 4
        step *= self.step_tokens
        keys = []
        for at in range(0, len(data) - step + 1, step):
            state.update(data[at : at + step])
            keys.append(state.digest())
        return keys
