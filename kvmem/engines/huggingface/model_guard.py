"""Refuses to work on a model that no longer computes what its stored memories were built with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmem.cache import FunctionWatch, ModelFingerprint, ModelWatch, fingerprint_of, foreign_code
from kvmem.engines.huggingface.probe import Probe
from kvmem.errors import ModelChangedError, ModelError
from kvmem.models import measured_layout


class ModelGuard:
    """Holds the fingerprint of an open model and checks that it still is the model's.

    `check` takes tens of microseconds: it looks for signs of a change (`ModelWatch`, `FunctionWatch`), and only if
    there is one it hashes the model again and computes a few tokens (`Probe`). What turns out the same, such as an
    adapter that was switched off and on, passes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        origin: str,
        template_identity: Callable[[], str],
    ) -> None:
        self._model, self._tokenizer, self._origin = model, tokenizer, origin
        self._template_identity = template_identity
        self._layout = measured_layout(model)  # by the kinds of the layers, which no change of weights affects
        self._function_mark: tuple[str, ...] = ()
        self._probe = Probe.of(model)
        if foreign_code(model):
            self._function_mark = (_mark(self._probe),)
        self._opened, self._opened_probe = self._plain(), self._probe
        self.fingerprint = self._now()
        self._watch, self._function_watch = ModelWatch(model), FunctionWatch(model)

    def check(self) -> None:
        """Raises ModelChangedError if the model changed since, and ModelError in training mode or under autocast."""
        self.check_weights()
        if (sign := self._function_watch.changed()) is not None:
            self._verify(sign)

    def check_weights(self) -> None:
        """As `check`, without the model's code, attributes and configuration: for what does not run its forward."""
        self.check_mode()
        if (sign := self._watch.changed()) is not None:
            self._verify(sign)

    def check_mode(self) -> None:
        """Raises ModelError in training mode or under autocast."""
        if self._model.training:
            raise ModelError(
                "The model is in training mode, where dropout and gradient checkpointing change what it computes. "
                "Call model.eval() first."
            )
        device_type = self._model.device.type
        if torch.is_autocast_enabled(device_type):
            raise ModelError(
                f"torch.autocast is on for {device_type}: keys and values would be rounded otherwise than the stored "
                "ones. Use the engine outside of autocast, and choose the precision by dtype when you open the model."
            )

    def verify(self) -> None:
        """Hashes the model again: seconds for the largest models. Raises ModelChangedError if it is another one."""
        sign = self._watch.changed() or self._function_watch.changed()
        if sign is not None:
            self._verify(sign)
        elif (difference := self.fingerprint.difference(self._now())) is not None:
            raise self._changed("A weight was written", difference)

    def adopt(self) -> ModelFingerprint:
        """Takes the model as it is now for the one that memories are built with from here on."""
        self._probe = Probe.of(self._model)
        same_weights = self._opened.difference(self._plain()) is None
        if foreign_code(self._model) or (same_weights and self._probe.differs(self._opened_probe)):
            self._function_mark = (_mark(self._probe),)
        else:
            self._function_mark = ()
        self._watch, self._function_watch = ModelWatch(self._model), FunctionWatch(self._model)
        self.fingerprint = self._now()
        return self.fingerprint

    def _verify(self, sign: str) -> None:
        watches = ModelWatch(self._model), FunctionWatch(self._model)  # before the hash: what changes during it is seen
        if (difference := self.fingerprint.difference(self._now())) is not None:
            raise self._changed(sign, difference)
        if Probe.of(self._model).differs(self._probe):
            raise self._changed(sign, "the same weights give other keys, values or logits of a few tokens")
        self._watch, self._function_watch = watches

    def _changed(self, sign: str, difference: str) -> ModelChangedError:
        return ModelChangedError(
            f"{sign} after the engine was opened, and stored memories no longer fit the model ({difference}). "
            "Undo the change, or call adopt_model() on the backend to go on with the model as it is now: memories "
            "that were built before are then refused."
        )

    def _plain(self) -> ModelFingerprint:
        found = fingerprint_of(self._model, self._tokenizer, self._origin, self._layout)
        return found.model_copy(update={"template": self._template_identity()})

    def _now(self) -> ModelFingerprint:
        plain = self._plain()
        return plain.model_copy(update={"adapters": (*plain.adapters, *self._function_mark)})


def _mark(probe: Probe) -> str:
    """What a fingerprint holds of a model whose function no configuration describes."""
    return f"code of its own: {probe.digest()}"
