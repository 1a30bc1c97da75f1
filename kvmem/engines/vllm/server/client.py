"""HTTP to a vLLM server: completions in token ids, and what can go wrong, by name. The only file that knows openai."""

from __future__ import annotations

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from kvmem.engines.generation import Sampling
from kvmem.engines.vllm.connector import REPORT
from kvmem.engines.vllm.requests import EngineAnswer
from kvmem.engines.vllm.server.config import VLLMServerConfig
from kvmem.errors import ConfigError, EngineError, FingerprintError, InjectionError, ServerError, did_you_mean

if TYPE_CHECKING:
    from openai.types import Completion

START = "python -m kvmem.engines.vllm.server.serve"


@dataclass(frozen=True)
class ServerRequest:
    """One completion. `prompt`: token ids, or text for the server's own tokenizer. `transfer`: for our connector."""

    prompt: tuple[int, ...] | str
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    salt: str | None = None
    transfer: dict[str, str] = field(default_factory=dict)
    past_end: bool = False


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream, `at_s` seconds after the request. The counts come with a last piece that holds no token."""

    at_s: float
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    cached_tokens: int | None


class ServerClient:
    """One server and one of the models that it serves. Safe to use from several threads."""

    def __init__(self, config: VLLMServerConfig) -> None:
        if importlib.util.find_spec("openai") is None:
            raise EngineError("The package openai is not installed. pip install 'kvmem[server]'.")
        import openai

        self.config = config
        self.url = config.base_url
        self.name = f"{config.model} at {config.base_url}"
        key = None if config.api_key_env is None else os.environ.get(config.api_key_env)
        if config.api_key_env is not None and not key:
            raise ConfigError(
                f"api_key_env names {config.api_key_env}, which is not set. Put the key of {self.url} there."
            )
        # No retries: a second try would be timed as the first, and would find what the first one left in the cache.
        self.openai = openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=0)
        self.leaves_out_zero = False

    def window(self) -> int:
        """The model's window in tokens. Raises ServerError if the server does not serve it, with those that it does."""
        with self._named_errors("first_token_timeout_s"):
            listed = self.openai.models.list(timeout=self._timeout("first_token_timeout_s"))
        served = {model.id: model for model in listed}
        if self.config.model not in served:
            raise ServerError(
                f"The server at {self.url} does not serve {self.config.model!r}. "
                f"{did_you_mean(self.config.model, served)}"
            )
        window = _extra(served[self.config.model], "max_model_len")
        if not isinstance(window, int):
            raise ServerError(f"{self.name} does not tell its window: it is no vLLM server. Start one: {START}.")
        return window

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """The token ids that the server's own tokenizer makes of `text`, without special tokens."""
        completion = self._create(ServerRequest(text, 1))
        self.leaves_out_zero = self._cached_tokens(completion.usage) is None
        return tuple(self._told(completion.choices[0], "prompt_token_ids"))

    def check_hit_is_told(self, token_ids: tuple[int, ...], salt: str) -> None:
        """For a server that told no count for a prompt that no cache held. Older ones (vLLM 0.24) leave a count of zero
        out, as they do every count without their flag: raises ServerError unless a sure hit is told."""
        request = ServerRequest(token_ids, 1, salt=salt)
        self._create(request)
        if self._cached_tokens(self._create(request).usage) is None:
            raise ServerError(
                f"{self.name} does not tell how many tokens it took from its cache. Start it with "
                f"--enable-prompt-tokens-details and with prefix caching, as {START} does."
            )

    def complete(self, request: ServerRequest) -> EngineAnswer:
        completion = self._create(request)
        choice = completion.choices[0]
        transfer = _extra(completion, "kv_transfer_params") or {}
        return EngineAnswer(
            tuple(self._told(choice, "token_ids")),
            choice.finish_reason,
            self.counted(completion.usage),
            transfer.get(REPORT),
        )

    def stream(self, request: ServerRequest) -> Iterator[Chunk]:
        """The answer in pieces. Closing the iterator ends the request on the server."""
        started = time.perf_counter()
        with self._named_errors("first_token_timeout_s"):
            stream = self.openai.completions.create(
                **self._body(request),
                stream=True,
                stream_options={"include_usage": True},
                timeout=self._timeout("first_token_timeout_s"),
            )
        with stream, self._named_errors("first_token_timeout_s"):
            for piece in stream:
                at_s = time.perf_counter() - started
                if at_s > self.config.whole_timeout_s:
                    raise self._too_slow("whole_timeout_s")
                if not piece.choices:
                    yield Chunk(at_s, (), "", None, self.counted(piece.usage))
                    continue
                choice = piece.choices[0]
                ids = tuple(self._told(choice, "token_ids"))
                yield Chunk(at_s, ids, choice.text, choice.finish_reason, None)

    def joined(self, chunks: Sequence[Chunk], report: Path | None) -> EngineAnswer:
        """A stream's pieces as one answer, with the report that the connector left at `report`, and that goes now."""
        counted = next((chunk.cached_tokens for chunk in chunks if chunk.cached_tokens is not None), None)
        if counted is None:
            raise ServerError(f"{self.name} broke the stream off before it told its counts. Its log says why.")
        told = None
        if report is not None:
            try:
                told = json.loads(report.read_text())
            except OSError as error:
                raise InjectionError(
                    f"The connector of {self.name} left no report of the injection ({error}). Is that its store?"
                ) from error
            report.unlink(missing_ok=True)
        reason = next((chunk.finish_reason for chunk in chunks if chunk.finish_reason), None)
        return EngineAnswer(tuple(token for chunk in chunks for token in chunk.token_ids), reason, counted, told)

    def counted(self, usage: Any) -> int:
        """How many prompt tokens the server took from a cache."""
        count = self._cached_tokens(usage)
        if count is None and not self.leaves_out_zero:
            raise ServerError(f"{self.name} did not tell how many tokens it took from its cache.")
        return count or 0

    def _create(self, request: ServerRequest) -> Completion:
        with self._named_errors("whole_timeout_s"):
            completion: Completion = self.openai.completions.create(
                **self._body(request), timeout=self._timeout("whole_timeout_s")
            )
        return completion

    def _body(self, request: ServerRequest) -> dict[str, Any]:
        sampling = request.sampling
        more: dict[str, Any] = {
            "top_k": sampling.top_k,
            "return_token_ids": True,
            "ignore_eos": request.past_end,
            "add_special_tokens": False,
            # Said, for a server takes what is not said from the model's generation_config.json.
            "repetition_penalty": 1.0,
            "min_p": 0.0,
        }
        if request.salt:
            more["cache_salt"] = request.salt
        if request.transfer:
            more["kv_transfer_params"] = request.transfer
        return {
            "model": self.config.model,
            "prompt": request.prompt if isinstance(request.prompt, str) else list(request.prompt),
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": sampling.seed,
            "extra_body": more,
        }

    def _timeout(self, knob: str) -> Any:
        from openai import Timeout

        allowed_s = min(getattr(self.config, knob), self.config.whole_timeout_s)
        return Timeout(allowed_s, connect=self.config.connect_timeout_s)

    def _told(self, choice: Any, name: str) -> Any:
        told = _extra(choice, name)
        if told is None:
            raise ServerError(f"{self.name} does not tell {name}: it is no vLLM server of 0.24 or later. {START}")
        return told

    @staticmethod
    def _cached_tokens(usage: Any) -> int | None:
        details = usage and usage.prompt_tokens_details
        return None if details is None else details.cached_tokens

    def _too_slow(self, knob: str) -> ServerError:
        allowed = f"{knob}={getattr(self.config, knob):g}"
        return ServerError(f"{self.name} took longer than {allowed}. It is overloaded or stuck; or allow more.")

    @contextmanager
    def _named_errors(self, knob: str) -> Iterator[None]:
        """openai's errors as ours, each with the server's name and the way out. `knob`: the time-out that holds."""
        import openai

        try:
            yield
        except openai.APITimeoutError as error:
            connecting = type(error.__cause__).__name__ == "ConnectTimeout"
            raise self._too_slow("connect_timeout_s" if connecting else knob) from error
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise ServerError(
                f"No server answers at {self.url} ({reason}). Start one ({START}), or give its address as base_url."
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            held = f"the key in {self.config.api_key_env}" if self.config.api_key_env else "requests without a key"
            raise ServerError(
                f"The server at {self.url} refuses {held}. Name the variable that holds its key as api_key_env."
            ) from error
        except openai.NotFoundError as error:
            raise ServerError(
                f"{self.url} has no such address or model ({error.message}). base_url ends with /v1 as a rule."
            ) from error
        except openai.BadRequestError as error:
            raise ServerError(f"{self.name} refuses the request: {error.message}") from error
        except openai.APIError as error:
            raise ServerError(f"{self.name} failed: {error.message}. Its log says why.") from error


def _extra(answer: Any, name: str) -> Any:
    """A field that vLLM adds to OpenAI's, or None."""
    return (answer.model_extra or {}).get(name)


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
