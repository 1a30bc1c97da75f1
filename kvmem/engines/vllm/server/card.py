"""What a server with our connector says of itself: a file in its store, so that a client needs none of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from kvmem.cache import ModelFingerprint, hash_tokenizer, sha256
from kvmem.errors import FingerprintError, ServerError

CARD_NAME = "kvmem_server.json"


class ServerCard(BaseModel):
    """Which model the server runs. `model`: a folder or hub name with weights and tokenizer, as the server sees it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    fingerprint: ModelFingerprint
    config: dict[str, Any]
    """The model's config.json."""
    ranks: int
    """Tensor-parallel ranks, each of which saves its own heads."""

    def write(self, store: Path) -> None:
        store.mkdir(parents=True, exist_ok=True)
        beside = store / f".{CARD_NAME}"
        beside.write_text(self.model_dump_json())
        beside.replace(store / CARD_NAME)

    @classmethod
    def read(cls, store: Path) -> ServerCard:
        """The card of the server whose store this is. Raises ServerError for a folder that is no server's store."""
        path = store / CARD_NAME
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, pydantic.ValidationError) as error:
            raise ServerError(
                f"{path} can't be read ({error}). Give as store_dir the folder that the server was started with, "
                "python -m kvmem.engines.vllm.server.serve --store FOLDER, or none: memories are then prefixes on the "
                "server."
            ) from error

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises FingerprintError for a tokenizer or chat template that is not the server's."""
        for name, ours in hash_tokenizer(tokenizer).items():
            theirs = getattr(self.fingerprint, name)
            if ours != theirs:
                raise FingerprintError(
                    f"{name}: {ours} here ({tokenizer.name_or_path}), {theirs} on the server ({self.model}). Name the "
                    "server's own as tokenizer_name_or_path."
                )

    def pretrained_config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(**self.config)


def of_a_served_model(server: str, model: str, tokenizer: PreTrainedTokenizerBase) -> ModelFingerprint:
    """What is known of a model behind a server without a card: the name that it is served by, and the tokenizer. Equal
    to no model's that is loaded: a memory of one is a prefix of ids, and holds no tensors for the other."""
    hashes = hash_tokenizer(tokenizer)
    return ModelFingerprint(
        architecture="served",
        dtype="unknown",
        layers=0,
        kv_heads=0,
        head_dim=0,
        rope={},
        config="unknown",
        weights=sha256(model),
        tokenizer=hashes["tokenizer"],
        template=hashes["template"],
        origin=server,
    )
