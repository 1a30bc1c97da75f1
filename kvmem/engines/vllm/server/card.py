"""The card of a server with kvmem's connector: a file in its store that describes its model to clients.

A client with the card does not need the model's weights.
"""

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
    """Describes the model that the server runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    """A folder or hub name with weights and tokenizer, as a path on the server."""
    fingerprint: ModelFingerprint
    config: dict[str, Any]
    """The model's config.json."""
    ranks: int
    """Tensor-parallel ranks, each of which saves its own heads."""
    orphans_after_s: float | None = None
    """After so many seconds without a sign of life from its client a file is deleted. None: never."""

    def write(self, store: Path) -> None:
        """Writes the card into the store, which is created if it does not exist."""
        store.mkdir(parents=True, exist_ok=True)
        beside = store / f".{CARD_NAME}"
        beside.write_text(self.model_dump_json())
        beside.replace(store / CARD_NAME)

    @classmethod
    def read(cls, store: Path) -> ServerCard:
        """Reads the card of a server's store. Raises ServerError for a folder that is not one."""
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
        for name, local_hash in hash_tokenizer(tokenizer).items():
            server_hash = getattr(self.fingerprint, name)
            if local_hash != server_hash:
                raise FingerprintError(
                    f"{name}: {local_hash} here ({tokenizer.name_or_path}), {server_hash} on the server "
                    f"({self.model}). Name the server's own as tokenizer_name_or_path."
                )

    def pretrained_config(self) -> PreTrainedConfig:
        """The model's configuration in transformers."""
        return AutoConfig.for_model(**self.config)


def fingerprint_of_served_model(server: str, model: str, tokenizer: PreTrainedTokenizerBase) -> ModelFingerprint:
    """The fingerprint of a model on a server without a card: the name under which it is served, and its tokenizer.

    It never equals the fingerprint of a loaded model, because memories of such a server have no tensors.
    """
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
