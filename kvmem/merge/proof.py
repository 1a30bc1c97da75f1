"""Whether a model's keys can be moved and its tokens recomputed, measured on the model when a merge is first asked for.

A short probe is computed at one position and at others. A merge may move what the model keeps of a token if that, with
the rotation of the model's own rotary module undone and done again, is what the model computes at the other position,
on every layer. It may recompute single tokens if that gives what one pass over the probe gives. Both together take five
forward passes of 8 tokens, and the comparison: 0.3 s for SmolLM2-135M on one busy CPU core.
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
from kvmem.models import decoder_of, max_positions

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

WAY_OUT = "Use merge=Reprefill."


def tolerance(dtype: torch.dtype, layer: int = 0) -> float:
    """By how much, as a share of its size, what a layer keeps of a token may differ: half of the dtype's digits agree.

    In layer 0: 0.0003 in float32, 0.03 in float16, 0.09 in bfloat16; behind it, where the rounding of all layers before
    adds up, four times that. Of SmolLM2-135M's layers the worst is off by 0.00003 in float32 and 0.05 in bfloat16. Keys
    that are rotated otherwise are off by about 1.
    """
    return math.sqrt(torch.finfo(dtype).eps) * (4 if layer else 1)


class Unproven(MergeError):
    """A measurement shows that merges of stored blocks would be wrong on a model. Begins with the model's type."""


class Motion(NamedTuple):
    """How one tensor of a layer changes with the position: one rotation of some of its dimensions."""

    rotary: int
    """An index into `Proof.rotaries`."""
    layout: Layout


Motions = tuple[Motion | None, Motion | None]
"""How the keys and the values of a layer change with the position; None where they don't."""


class Proof:
    """What was measured on one model. Each measurement is made once, when it is first asked for."""

    def __init__(self) -> None:
        self.rotaries: list[Rotary] = []
        """The ways in which the model computes the angles of positions."""
        self._motions: list[Motions] | Unproven | None = None
        self._passes: dict[bool, Pass | Unproven] = {}
        self._lock = threading.RLock()

    def motions(self, model: PreTrainedModel) -> list[Motions]:
        """How keys and values of each layer move.

        Raises Unproven, with the layer and the difference, for a model whose keys no rotation moves.
        """
        with self._lock:
            if self._motions is None:
                try:
                    self._motions = self._measured(model)
                except Unproven as refusal:
                    self._motions = refusal
            if isinstance(self._motions, Unproven):
                raise Unproven(str(self._motions))
            return self._motions

    def recomputing(self, model: PreTrainedModel, tokens: int) -> Pass:
        """How single ones of `tokens` tokens are recomputed. Raises Unproven for a model with which no way is right.

        Where a sliding window is shorter than the text, this is measured on a probe that is longer than the window,
        which takes less than a joint prefill of the text.
        """
        windows = {window for window in dynamic_cache.windows_of(model.config) if window and window < tokens}
        with self._lock:
            if bool(windows) not in self._passes:
                length = PROBE_TOKENS + (max(windows) if windows else 0)
                try:
                    self._passes[bool(windows)] = _right_pass(model, length)
                except Unproven as refusal:
                    self._passes[bool(windows)] = refusal
            found = self._passes[bool(windows)]
        if isinstance(found, Unproven):
            raise Unproven(str(found))
        return found

    def check_lengths(self, model: PreTrainedModel, lengths: Sequence[int], merged: int) -> None:
        """Raises Unproven if the model rotates a text of `merged` tokens with other frequencies than items of `lengths`
        tokens, as dynamic and long-RoPE scaling do beyond the length that a model was first trained for."""
        used = {motion.rotary for pair in self.motions(model) for motion in pair if motion is not None}
        for rotary in sorted(used):
            end = _angle_of_1(self.rotaries[rotary], merged)
            for length in sorted(set(lengths)):
                if not torch.equal(_angle_of_1(self.rotaries[rotary], length), end):
                    raise Unproven(
                        f"{model.config.model_type}: it rotates keys with other frequencies in a text of {merged} "
                        f"tokens than in one of {length}, as which a memory was built. Merge shorter memories, or use "
                        "merge=Reprefill."
                    )

    def move(self, model: PreTrainedModel, layers: Sequence[KV], old_T: torch.Tensor, new_T: torch.Tensor) -> None:
        """Moves what each layer keeps of each token from position `old` to `new`, (tokens,) int64, in place."""
        motions = self.motions(model)
        rotations = [Rotation.between(rotary.at(old_T), rotary.at(new_T)) for rotary in self.rotaries]
        for pair, how in zip(layers, motions, strict=True):
            for tensor, motion in zip(pair, how, strict=True):
                if motion is not None:
                    rotate(tensor, rotations[motion.rotary], motion.layout)

    def _measured(self, model: PreTrainedModel) -> list[Motions]:
        name = model.config.model_type
        far = min(max_positions(model.config.get_text_config(decoder=True)), FAR) - PROBE_TOKENS
        if far <= NEAR:
            raise Unproven(f"{name}: it has too few positions to measure whether its keys can be moved. {WAY_OUT}")
        ids = _probe_ids(model, PROBE_TOKENS)
        rotaries: list[Rotary] = []
        with rotary_calls(model, range(OLD_POSITION, OLD_POSITION + PROBE_TOKENS), rotaries):
            old = _placed(model, ids, OLD_POSITION)
        rotaries += rotary_tables(model, far + PROBE_TOKENS)
        while far > NEAR and any(
            not torch.equal(_angle_of_1(rotary, NEAR), _angle_of_1(rotary, far + PROBE_TOKENS)) for rotary in rotaries
        ):  # a longer text has other frequencies, with which more than the keys differs
            far //= 2
        far = max(far, NEAR + 1)
        moved = [_placed(model, ids, position) for position in (NEAR, far)]
        from_T, near_T, far_T = (_span(position, model) for position in (OLD_POSITION, NEAR, far))
        moves = [
            [Rotation.between(rotary.at(from_T), rotary.at(to_T)) for to_T in (near_T, far_T)] for rotary in rotaries
        ]
        motions: list[Motions] = []
        likely: list[Motion] = []
        for layer, pair in enumerate(old):
            found = []
            for which, (kind, tensor) in enumerate(zip(("keys", "values"), pair, strict=True)):
                motion, off = _nearest(tensor, [layers[layer][which] for layers in moved], moves, likely)
                if not off <= tolerance(model.dtype, layer):
                    how = "no rotation of its own moves them there" if moves else "it has no rotary embedding"
                    raise Unproven(
                        f"{name}: the {kind} of layer {layer} at another position differ by {off:.2g} of their size, "
                        f"where rounding explains {tolerance(model.dtype, layer):.2g}, and {how}. {WAY_OUT}"
                    )
                found.append(motion)
                likely = likely if motion is None else [motion, *(other for other in likely if other != motion)]
            motions.append((found[0], found[1]))
        self.rotaries = rotaries
        return motions


_proofs: WeakKeyDictionary[PreTrainedModel, tuple[ModelFingerprint | None, Proof]] = WeakKeyDictionary()
_proofs_lock = threading.Lock()


def proof_of(model: PreTrainedModel, fingerprint: ModelFingerprint | None = None) -> Proof:
    """The measurements on this model. They are made when they are first asked for, and again for another fingerprint.

    fingerprint: what the model is now; None if it is what it was.
    """
    with _proofs_lock:
        known, proof = _proofs.get(model, (None, None))
        if proof is None or (known is not None and fingerprint is not None and known != fingerprint):
            proof = Proof()
        _proofs[model] = fingerprint or known, proof
        return proof


def _span(start: int, model: PreTrainedModel) -> torch.Tensor:
    return torch.arange(start, start + PROBE_TOKENS, device=model.device)


def _angle_of_1(rotary: Rotary, tokens: int) -> torch.Tensor:
    """The cos of position 1 in a text of so many tokens."""
    return rotary.at(torch.tensor([1, max(1, tokens - 1)])).cos_TF[0]


def _probe_ids(model: PreTrainedModel, tokens: int) -> list[int]:
    """Token ids from the middle of the vocabulary, far from special tokens."""
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    return [vocabulary // 4 + (7919 * i) % max(1, vocabulary // 2) for i in range(tokens)]


@torch.inference_mode()
def _placed(model: PreTrainedModel, ids: Sequence[int], position: int) -> list[KV]:
    """What each layer keeps of the probe if its first token has this position and nothing is before it."""
    ids_1T = torch.tensor([ids], device=model.device)
    told = takes_positions(model)
    cache = dynamic_cache.shifted(0 if told else position, model.config)
    arguments = {"position_ids": _span(position, model)[None]} if told else {}
    try:
        decoder_of(model)(input_ids=ids_1T, past_key_values=cache, use_cache=True, **arguments)
    except torch.OutOfMemoryError:
        raise
    except FORWARD_ERRORS as error:
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise Unproven(
            f"{model.config.model_type}: it computes no tokens at a given position ({type(error).__name__}: {said}). "
            f"{WAY_OUT}"
        ) from error
    return dynamic_cache.layers_of(cache)


def _nearest(
    old: torch.Tensor, expected: Sequence[torch.Tensor], moves: Sequence[Sequence[Rotation]], likely: Sequence[Motion]
) -> tuple[Motion | None, float]:
    """The motion that comes nearest to what is expected at each position, and how far it is off.

    moves: by rotary, the rotation to each position. likely: the motions that are tried first.
    """
    best: tuple[Motion | None, float] = (None, _off([old] * len(expected), expected))
    every = [
        Motion(rotary, layout)
        for rotary, to in enumerate(moves)
        for layout in Layout.possible(old.shape[-1], to[0].cos_TF.shape[-1])
    ]
    for motion in (*(motion for motion in likely if motion in every), *every):
        if best[1] <= tolerance(old.dtype):
            break
        rotated = [old.clone() for _ in expected]
        for keys, rotation in zip(rotated, moves[motion.rotary], strict=True):
            rotate(keys, rotation, motion.layout)
        off = _off(rotated, expected)
        if off < best[1]:
            best = motion, off
    return best


def _off(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """How far tokens are off, as a share of their size: the worst token, or, of a dtype with few digits, the median.

    There a token that falls to another expert by rounding differs more.
    """
    found = []
    for one_BHTD, other_BHTD in zip(ours, theirs, strict=True):
        one_BHTD, other_BHTD = one_BHTD.float(), other_BHTD.float()
        difference_T = (one_BHTD - other_BHTD).square().sum(dim=(0, 1, 3)).sqrt()
        size_T = other_BHTD.square().sum(dim=(0, 1, 3)).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        off_T = difference_T / size_T
        found.append(float(off_T.max() if ours[0].dtype in (torch.float32, torch.float64) else off_T.median()))
    return max(found)


@torch.inference_mode()
def _right_pass(model: PreTrainedModel, tokens: int) -> Pass:
    """The faster way to recompute single tokens that gives what one pass over the probe gives.

    Raises Unproven, with the reasons, if none does.
    """
    ids = _probe_ids(model, tokens)
    cache = dynamic_cache.shifted(0, model.config)
    model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    right = dynamic_cache.layers_of(cache)
    positions = [tokens - PROBE_TOKENS + at for at in RECOMPUTED]
    reasons = []
    ways: tuple[tuple[Pass, str], ...] = ((by_mask, "with a mask"), (by_runs, "behind the tokens before"))
    for way, name in ways:
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
        offs = [_off(now, before) for now, before in zip(tried, right, strict=True)]
        wrong = [layer for layer, off in enumerate(offs) if not off <= tolerance(model.dtype, layer)]
        if not wrong:
            return way
        reasons.append(f"{name} layer {wrong[0]} differs by {offs[wrong[0]]:.2g} of its size")
    raise Unproven(
        f"{model.config.model_type}: recomputing single tokens does not give what one pass over them gives "
        f"({'; '.join(reasons)}). {WAY_OUT}"
    )
