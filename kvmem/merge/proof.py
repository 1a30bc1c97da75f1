"""Whether a model's keys can be moved and its tokens recomputed, measured on the model when a merge is first asked for.

A short probe is computed at one position and at others. A merge may move what the model keeps of a token if that, with
the rotation of the model's own rotary module undone and done again, is what the model computes at the other position,
on every layer. It may recompute single tokens if that gives what one pass over the probe gives.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from kvmem.cache import KV, ModelFingerprint, dynamic_cache
from kvmem.errors import MergeError
from kvmem.merge.passes import Pass, by_mask, by_runs, takes_positions
from kvmem.merge.rope import Layout, Rotary, Rotation, rotary_calls, rotary_tables, rotate
from kvmem.models import max_positions

PROBE_TOKENS = 8
OLD_POSITION = 3
"""Where the probe is built. It is moved from there to positions near and far."""
NEAR, FAR = 24, 1 << 10
"""Positions that the probe is moved to; the second is less in a model with fewer positions. Much farther, the rounding
of a model's own angles in float32 is what differs."""
RECOMPUTED = (2, 3, 6)
"""Which of the last `PROBE_TOKENS` of a probe are recomputed, to compare."""

FORWARD_ERRORS = (TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError, RuntimeError)
"""What the forward pass of a model raises for a mask or positions that it does not take. It is foreign code."""


def tolerance(dtype: torch.dtype) -> float:
    """By how much, as a share of its size, a token's keys may differ: half of the dtype's digits must agree.

    0.0003 in float32, 0.03 in float16, 0.09 in bfloat16. Another rotation differs by about 1.
    """
    return math.sqrt(torch.finfo(dtype).eps)


class Unproven(MergeError):
    """A measurement shows that merges of stored blocks would be wrong on a model. Begins with the model's type."""


class Motion(NamedTuple):
    """How one tensor of a layer changes with the position: one rotation of some of its dimensions."""

    rotary: int
    """An index into `Proof.rotaries`."""
    layout: Layout


class Proof:
    """What was measured on one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.rotaries: list[Rotary] = []
        self._motions: list[tuple[Motion | None, Motion | None]] | None = None
        self._refusal = ""
        self._passes: dict[bool, Pass | str] = {}
        self._lock = threading.RLock()

    def motions(self, model: PreTrainedModel) -> list[tuple[Motion | None, Motion | None]]:
        """How keys and values of each layer move; None where they don't change with the position.

        Raises Unproven, with the layer and the difference, for a model whose keys no rotation moves.
        """
        with self._lock:
            if self._motions is None and not self._refusal:
                try:
                    self._motions = self._measured(model)
                except Unproven as refusal:
                    self._refusal = str(refusal)
            if self._motions is None:
                raise Unproven(self._refusal)
            return self._motions

    def recomputing(self, model: PreTrainedModel, tokens: int) -> Pass:
        """How single ones of `tokens` tokens are recomputed. Raises Unproven for a model with which no way is right.

        Where a sliding window is shorter than the text, this is measured on a probe that is longer than the window.
        """
        windows = {window for window in dynamic_cache.windows_of(model.config) if window and window < tokens}
        with self._lock:
            if bool(windows) not in self._passes:
                length = PROBE_TOKENS + (max(windows) if windows else 0)
                self._passes[bool(windows)] = _right_pass(model, length)
            found = self._passes[bool(windows)]
        if isinstance(found, str):
            raise Unproven(found)
        return found

    def check_lengths(self, model: PreTrainedModel, lengths: Sequence[int], merged: int) -> None:
        """Raises Unproven if items of `lengths` tokens have other frequencies than a text of `merged` tokens."""
        used = {motion.rotary for pair in self.motions(model) for motion in pair if motion is not None}
        for rotary in sorted(used):
            end = self._cos_of_1(rotary, merged)
            for length in sorted(set(lengths)):
                if not torch.equal(self._cos_of_1(rotary, length), end):
                    raise Unproven(
                        f"the rotary frequencies of {model.config.model_type} are others in a text of {merged} tokens "
                        f"than in one of {length}, with which a memory was built. Merge less"
                    )

    def _cos_of_1(self, rotary: int, tokens: int) -> torch.Tensor:
        return self.rotaries[rotary].at(torch.tensor([1, max(1, tokens - 1)])).cos_TF[0]

    def move(self, model: PreTrainedModel, layers: Sequence[KV], old_T: torch.Tensor, new_T: torch.Tensor) -> None:
        """Moves keys (and values that have a position) of each token from position `old` to `new`, in place."""
        rotations = [Rotation.between(rotary.at(old_T), rotary.at(new_T)) for rotary in self.rotaries]
        for pair, motions in zip(layers, self.motions(model), strict=False):
            for tensor, motion in zip(pair, motions, strict=True):
                if motion is not None:
                    rotate(tensor, rotations[motion.rotary], motion.layout)

    def _measured(self, model: PreTrainedModel) -> list[tuple[Motion | None, Motion | None]]:
        name = model.config.model_type
        far = min(max_positions(model.config.get_text_config(decoder=True)), FAR) - PROBE_TOKENS
        if far <= NEAR:
            raise Unproven(f"{name} has too few positions to measure whether its keys can be moved")
        ids = _probe_ids(model, PROBE_TOKENS)
        found: list[Rotary] = []
        with rotary_calls(model, range(OLD_POSITION, OLD_POSITION + PROBE_TOKENS), found):
            old = _placed(model, ids, OLD_POSITION)
        found += rotary_tables(model, far + PROBE_TOKENS)
        moved = {position: _placed(model, ids, position) for position in (NEAR, far)}
        moves = {
            position: [
                Rotation.between(rotary.at(_span(OLD_POSITION, model)), rotary.at(_span(position, model)))
                for rotary in found
            ]
            for position in moved
        }
        motions = []
        for layer, pair in enumerate(old):
            both: list[Motion | None] = []
            for which, tensor in enumerate(pair):
                expected = {position: moved[position][layer][which] for position in moved}
                motion, off = _best(tensor, expected, moves, prefer=both[:1] + [m for p in motions[-1:] for m in p])
                if not off <= tolerance(model.dtype):
                    kind = ("keys", "values")[which]
                    why = (
                        f"by {off:.2g} of their size from the nearest rotation of its own"
                        if motion is not None
                        else f"by {off:.2g} of their size, and no rotary embedding of it tells how"
                    )
                    raise Unproven(
                        f"{name}: the {kind} of layer {layer} at another position differ {why}; rounding explains "
                        f"{tolerance(model.dtype):.2g}"
                    )
                both.append(motion)
            motions.append((both[0], both[1]))
        self.rotaries = found
        return motions


_proofs: WeakKeyDictionary[PreTrainedModel, tuple[ModelFingerprint | None, Proof]] = WeakKeyDictionary()
_proofs_lock = threading.Lock()


def proof_of(model: PreTrainedModel, fingerprint: ModelFingerprint | None = None) -> Proof:
    """The measurements on this model. They are made when they are first asked for, and again for another fingerprint.

    fingerprint: what the model is now; None if it is what it was.
    """
    with _proofs_lock:
        known = _proofs.get(model)
        if known is None or (fingerprint is not None and known[0] is not None and known[0] != fingerprint):
            known = fingerprint, Proof(model)
        elif fingerprint is not None:
            known = fingerprint, known[1]
        _proofs[model] = known
        return known[1]


def _span(start: int, model: PreTrainedModel) -> torch.Tensor:
    return torch.arange(start, start + PROBE_TOKENS, device=model.device)


def _probe_ids(model: PreTrainedModel, tokens: int) -> list[int]:
    """Token ids from the middle of the vocabulary, far from special tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [vocabulary // 4 + (7919 * i) % max(1, vocabulary // 2) for i in range(tokens)]


@torch.inference_mode()
def _placed(model: PreTrainedModel, ids: Sequence[int], position: int) -> list[KV]:
    """What each layer keeps of the probe if its first token has this position and nothing is before it."""
    ids_1T = torch.tensor([ids], device=model.device)
    told = takes_positions(model)
    cache = dynamic_cache.shifted(0 if told else position, model.config)
    arguments = {}
    if told:
        arguments["position_ids"] = torch.arange(position, position + len(ids), device=model.device)[None]
    try:
        model.get_decoder()(input_ids=ids_1T, past_key_values=cache, use_cache=True, **arguments)
    except torch.OutOfMemoryError:
        raise
    except FORWARD_ERRORS as error:
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise Unproven(
            f"{model.config.model_type} computes no tokens at a given position ({type(error).__name__}: {said})"
        ) from error
    return dynamic_cache.layers_of(cache)


def _best(
    old: torch.Tensor,
    expected: dict[int, torch.Tensor],
    moves: dict[int, list[Rotation]],
    prefer: Sequence[Motion | None],
) -> tuple[Motion | None, float]:
    """The motion that comes nearest to what is expected at each position, and how far it is off."""
    best: tuple[Motion | None, float] = (None, _off(old, expected.values()))
    limit = tolerance(old.dtype)
    count = len(next(iter(moves.values())))
    pairs = [moves[position][i].cos_TF.shape[-1] for position in [next(iter(moves))] for i in range(count)]
    every = [Motion(i, layout) for i in range(count) for layout in Layout.possible(old.shape[-1], pairs[i])]
    for motion in [*(m for m in prefer if m in every), *every]:
        if best[1] <= limit:
            break
        rotated = {position: old.clone() for position in expected}
        for position, keys in rotated.items():
            rotate(keys, moves[position][motion.rotary], motion.layout)
        off = max(_off(rotated[position], [expected[position]]) for position in expected)
        if off < best[1]:
            best = motion, off
    return best


def _off(ours_BHTD: torch.Tensor, others: Sequence[torch.Tensor]) -> float:
    """How far tokens are off, as a share of their size: the worst token, or, of a dtype with few digits, the median.

    There a token that falls to another expert by rounding differs more.
    """
    found = []
    for other_BHTD in others:
        difference_T, size_T = (
            t.double().square().sum(dim=(0, 1, 3)).sqrt() for t in (ours_BHTD - other_BHTD, other_BHTD)
        )
        off_T = difference_T / size_T.clamp_min(torch.finfo(torch.float32).tiny)
        found.append(float(off_T.max() if ours_BHTD.dtype in (torch.float32, torch.float64) else off_T.median()))
    return max(found)


@torch.inference_mode()
def _right_pass(model: PreTrainedModel, tokens: int) -> Pass | str:
    """The faster way to recompute single tokens that gives what one pass over the probe gives; else why none does."""
    ids = _probe_ids(model, tokens)
    cache = dynamic_cache.shifted(0, model.config)
    model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    right = dynamic_cache.layers_of(cache)
    positions = [tokens - PROBE_TOKENS + at for at in RECOMPUTED]
    reasons = []
    for way, name in ((by_mask, "with a mask"), (by_runs, "behind the tokens before")):
        tried = [(keys.clone(), values.clone()) for keys, values in right]
        for pair in tried:
            for tensor in pair:
                tensor[..., positions, :] = 0
        try:
            way(model, ids, tried, positions)
        except torch.OutOfMemoryError:
            raise
        except FORWARD_ERRORS as error:
            reasons.append(f"{name} it raises {type(error).__name__}")
            continue
        offs = [max(_off(o, [r]) for o, r in zip(ours, theirs, strict=True)) for ours, theirs in zip(tried, right, strict=True)]
        worst = max(range(len(offs)), key=offs.__getitem__)
        if offs[worst] <= tolerance(model.dtype):
            return way
        reasons.append(f"{name} layer {worst} differs by {offs[worst]:.2g} of its size")
    return f"{model.config.model_type}: recomputing single tokens is not what one pass gives: {', '.join(reasons)}"
