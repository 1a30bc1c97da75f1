"""Refuses to work on a model that no longer computes what its stored memories were built with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmem.cache import ModelFingerprint, ModelWatch, fingerprint_of
from kvmem.errors import ModelChangedError, ModelError
from kvmem.models import measured_layout


class ModelGuard:
    """Holds the fingerprint of an open model and checks that it still is the model's.

    `check` takes tens of microseconds: it looks for signs of a change (`ModelWatch`) and hashes the model again only if
    there is one. What turns out the same, such as an adapter that was switched off and on, passes.
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
        self.fingerprint = self._now()
        self._watch = ModelWatch(model)

    def check(self) -> None:
        """Raises ModelChangedError if the model changed since, and ModelError in training mode or under autocast."""
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
        if (sign := self._watch.changed()) is not None:
            self.verify(sign)

    def verify(self, sign: str = "A weight was written") -> None:
        """Hashes the model again: seconds for the largest models. Raises ModelChangedError if it is another one."""
        watch, now = ModelWatch(self._model), self._now()
        if (difference := self.fingerprint.difference(now)) is not None:
            raise ModelChangedError(
                f"{sign} after the engine was opened, and stored memories no longer fit the model ({difference}). "
                "Undo the change, or call adopt_model() on the backend to go on with the model as it is now: memories "
                "that were built before are then refused."
            )
        self._watch = watch

    def adopt(self) -> ModelFingerprint:
        """Takes the model as it is now for the one that memories are built with from here on."""
        self._watch, self.fingerprint = ModelWatch(self._model), self._now()
        return self.fingerprint

    def _now(self) -> ModelFingerprint:
        found = fingerprint_of(self._model, self._tokenizer, self._origin, self._layout)
        return found.model_copy(update={"template": self._template_identity()})
