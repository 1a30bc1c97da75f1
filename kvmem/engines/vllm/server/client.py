"""The HTTP client of a vLLM server: completions in token ids, with errors of kvmem's own.

This is the only file that imports openai.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from kvmem.engines.vllm.connector import REPORT, Report
from kvmem.engines.vllm.requests import EngineAnswer, EngineRequest
from kvmem.engines.vllm.server.config import VLLMServerConfig
from kvmem.errors import ConfigError, EngineError, FingerprintError, InjectionError, ServerError, did_you_mean

if TYPE_CHECKING:
    from openai.types import Completion

START = "python -m kvmem.engines.vllm.server.serve"


@dataclass(frozen=True)
class Chunk:
    """A part of a stream, `at_s` seconds after the request. Only the last one, which has no token, has counts."""

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
        # No retries: they would be part of the measured time, and would hit what the first attempt left in the cache.
        self.openai = openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=0)
        self.leaves_out_zero = False

    def window(self) -> int:
        """The model's window in tokens. Raises ServerError, naming the served models, if this one is not served."""
        with self._named_errors("first_token_timeout_s"):
            models = self.openai.models.list(timeout=self._timeout("first_token_timeout_s"))
        served = {model.id: model for model in models}
        if self.config.model not in served:
            raise ServerError(
                f"The server at {self.url} does not serve {self.config.model!r}. "
                f"{did_you_mean(self.config.model, served)}"
            )
        window = _extra(served[self.config.model], "max_model_len")
        if not isinstance(window, int):
            raise ServerError(f"{self.name} does not report its window: it is not a vLLM server. Start one: {START}.")
        return window

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """The token ids that the server's own tokenizer makes of `text`, without special tokens."""
        completion = self._create(EngineRequest((), 1), text)
        self.leaves_out_zero = self._cached_tokens(completion.usage) is None
        return tuple(self._required(completion.choices[0], "prompt_token_ids"))

    def check_counts_hits(self, token_ids: tuple[int, ...], salt: str) -> None:
        """Raises ServerError unless the server reports the count of a certain hit.

        For a server that reported no count for a prompt that no cache held: vLLM 0.24 omits a count of zero, and
        without its flag it omits every count.
        """
        request = EngineRequest(token_ids, 1, salt=salt)
        self._create(request)
        if self._cached_tokens(self._create(request).usage) is None:
            raise ServerError(
                f"{self.name} does not report how many tokens it took from its cache. Start it with "
                f"--enable-prompt-tokens-details and with prefix caching, as {START} does."
            )

    def complete(self, request: EngineRequest) -> EngineAnswer:
        """Sends a request and waits for its whole answer."""
        completion = self._create(request)
        choice = completion.choices[0]
        transfer = _extra(completion, "kv_transfer_params") or {}
        return EngineAnswer(
            tuple(self._required(choice, "token_ids")),
            choice.finish_reason,
            self.counted(completion.usage),
            Report.parse(transfer[REPORT]) if REPORT in transfer else None,
        )

    def stream(self, request: EngineRequest) -> Iterator[Chunk]:
        """Yields the answer in chunks. Closing the iterator aborts the request on the server."""
        started = time.perf_counter()
        with self._named_errors("first_token_timeout_s"):
            stream = self.openai.completions.create(
                **self._body(request),
                stream=True,
                stream_options={"include_usage": True},
                timeout=self._timeout("first_token_timeout_s"),
            )
        with stream, self._named_errors("first_token_timeout_s"):
            for event in stream:
                at_s = time.perf_counter() - started
                if at_s > self.config.whole_timeout_s:
                    raise self._too_slow("whole_timeout_s")
                if not event.choices:
                    yield Chunk(at_s, (), "", None, self.counted(event.usage))
                    continue
                choice = event.choices[0]
                ids = tuple(self._required(choice, "token_ids"))
                yield Chunk(at_s, ids, choice.text, choice.finish_reason, None)

    def joined(self, chunks: Sequence[Chunk], report_path: Path | None) -> EngineAnswer:
        """The chunks of a stream as one answer, with the connector's report, whose file `report_path` it deletes."""
        counted = next((chunk.cached_tokens for chunk in chunks if chunk.cached_tokens is not None), None)
        if counted is None:
            raise ServerError(f"{self.name} ended the stream before it reported its counts. Its log says why.")
        report = None
        if report_path is not None:
            try:
                report = Report.parse(json.loads(report_path.read_text()))
            except OSError as error:
                raise InjectionError(
                    f"The connector of {self.name} left no report of the injection ({error}). Is that its store?"
                ) from error
            report_path.unlink(missing_ok=True)
        reason = next((chunk.finish_reason for chunk in chunks if chunk.finish_reason), None)
        return EngineAnswer(tuple(token for chunk in chunks for token in chunk.token_ids), reason, counted, report)

    def counted(self, usage: Any) -> int:
        """How many prompt tokens the server took from a cache. Raises ServerError if it does not report that."""
        count = self._cached_tokens(usage)
        if count is None and not self.leaves_out_zero:
            raise ServerError(f"{self.name} did not report how many tokens it took from its cache.")
        return count or 0

    def _create(self, request: EngineRequest, text: str | None = None) -> Completion:
        with self._named_errors("whole_timeout_s"):
            completion: Completion = self.openai.completions.create(
                **self._body(request, text), timeout=self._timeout("whole_timeout_s")
            )
        return completion

    def _body(self, request: EngineRequest, text: str | None = None) -> dict[str, Any]:
        """The arguments of a completion. With `text` the server tokenizes that, instead of the request's token ids."""
        sampling = request.sampling
        more: dict[str, Any] = {
            "top_k": sampling.top_k,
            "return_token_ids": True,
            "ignore_eos": request.past_end,
            "add_special_tokens": False,
            # Explicit: a server takes what is not given from the model's generation_config.json.
            "repetition_penalty": 1.0,
            "min_p": 0.0,
        }
        if request.salt:
            more["cache_salt"] = request.salt
        if request.transfer:
            more["kv_transfer_params"] = request.transfer
        return {
            "model": self.config.model,
            "prompt": list(request.token_ids) if text is None else text,
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

    def _required(self, choice: Any, name: str) -> Any:
        """A field that vLLM adds to OpenAI's. Raises ServerError if it is missing."""
        value = _extra(choice, name)
        if value is None:
            raise ServerError(f"{self.name} does not report {name}: it is not a vLLM server of 0.24 or later. {START}")
        return value

    @staticmethod
    def _cached_tokens(usage: Any) -> int | None:
        details = usage and usage.prompt_tokens_details
        return None if details is None else details.cached_tokens

    def _too_slow(self, knob: str) -> ServerError:
        allowed = f"{knob}={getattr(self.config, knob):g}"
        return ServerError(f"{self.name} took longer than {allowed}. It is overloaded or stuck; or allow more.")

    @contextmanager
    def _named_errors(self, knob: str) -> Iterator[None]:
        """Turns openai's errors into kvmem's, which name the server and the way out. `knob`: the time-out in force."""
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
HIT_TOKENS = 300
"""More than a block of any engine, so that the second of two equal prompts is a hit."""


def check_tokens_and_counts(client: ServerClient, tokenizer: PreTrainedTokenizerBase, window: int) -> None:
    """Raises FingerprintError if the server has another tokenizer, and ServerError if it does not report its counts."""
    token_ids = tuple(tokenizer(PROBE, add_special_tokens=False).input_ids)
    if token_ids != client.prompt_ids(PROBE):
        raise FingerprintError(
            f"{client.name} has another tokenizer than {tokenizer.name_or_path}. Name the model's own as "
            "tokenizer_name_or_path."
        )
    if client.leaves_out_zero:
        repeated = (token_ids * (HIT_TOKENS // len(token_ids) + 1))[: window // 2]
        client.check_counts_hits(repeated, str(uuid.uuid4()))
