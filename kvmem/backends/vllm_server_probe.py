"""What is asked of a server once, before its figures are trusted: whose tokens it speaks, and if it counts hits."""

from __future__ import annotations

import uuid

from transformers import PreTrainedTokenizerBase

from kvmem.backends.vllm_server_client import ServerClient
from kvmem.errors import FingerprintError

PROBE = "A text of letters, digits 1234567890, (signs) and ünïcödé: which tokens is it?\n"
TOKENS = 300
"""More than a block of any engine, so that sending it twice is a hit."""


def check_tokens_and_counts(client: ServerClient, tokenizer: PreTrainedTokenizerBase, window: int) -> None:
    """Raises FingerprintError if the server's tokens are not ours, and ServerError if it hides its counts."""
    ours = tuple(tokenizer(PROBE, add_special_tokens=False).input_ids)
    if ours != client.prompt_ids(PROBE):
        raise FingerprintError(
            f"{client.name} has another tokenizer than {tokenizer.name_or_path}. Name the model's own as "
            "tokenizer_name_or_path."
        )
    if client.leaves_out_zero:
        many = (ours * (TOKENS // len(ours) + 1))[: window // 2]
        client.check_hit_is_told(many, str(uuid.uuid4()))
