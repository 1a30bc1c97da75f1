"""From text and chat template to token ids, and the split of a prompt into cached tokens and the rest.

A prompt is rendered and tokenized once, as a whole. Tokenizing memory and query separately can change the tokens where
they meet, and templates behave differently when rendered in parts (default system prompt, second BOS, stripped
`<think>`). The stored tokens are cut where a query is unlikely to change them, and the prefix that a query shares is
verified token by token. A template or tokenizer that changes stored tokens costs a few tokens of prefill, and never a
wrong answer.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from kvmem.cache import MemoryTokens, Message, Source, hash_template, sha256, text_fault
from kvmem.errors import ConfigError, PromptError

Query = str | Sequence[Message]
"""A query: a text, or the chat turns that follow the memory."""

TemplateKind = Literal["chat", "plain"]

SHOWN_CHARACTERS = 40
"""How much of a text an error message shows."""

MOST_LEFT_OFF = 4
"""How many tokens at the end of a memory are not stored at most where a query could change them.

A query that changes more of them costs a prefill of those, because the prefix is verified at every query.
"""

# Placeholders that occur in no real text. They show where a template puts the memory and the query.
_MEMORY_PROBE = "kvmem memory probe 5b1f"
_QUERY_PROBE = "kvmem query probe 9d3e"
_TURNS_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "<think>Why not?</think>\n\nBecause."},
)

_RENDERING_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError)
"""What a chat template raises: it is a program of its own."""

TAKEN_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "tools",
    "documents",
    "kwargs",
}
"""Arguments of transformers' rendering that are not the template's own."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A verified split of one prompt: a cache holds `memory_ids`; `query_ids`, at least one, are to be prefilled."""

    memory_ids: tuple[int, ...]
    query_ids: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.memory_ids + self.query_ids

    @property
    def digest(self) -> str:
        """Hash of all ids, wherever they are split. Both arms of a comparison must have the same."""
        return sha256(",".join(map(str, self.ids)))


@dataclass(frozen=True)
class _Rendered:
    """A rendered prompt: token ids, each token's (start, end) in characters, and where memory and query are.

    `query_start` is reliable for the placeholder query only; the text of a real query may also occur elsewhere.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    memory_start: int
    memory_end: int
    query_start: int
    memory_text: str
    """The memory as the template renders it, which may trim or escape it."""

    def tokens_before(self, char: int) -> int:
        """How many tokens from the start of the prompt end at or before `char`."""
        return next((i for i, (_, end) in enumerate(self.spans) if end > char), len(self.spans))


class PromptTemplate:
    """Turns memory and query into a prompt.

    `chat` renders the model's own chat template: the memory is the system turn, or the earlier turns, and the query is
    the user turn. If the template has no system role, the memory is the start of the user turn. `plain` concatenates
    memory and query. A template that takes a content as a list of parts gets it as one part of text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kind: TemplateKind, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """kwargs: the chat template's own arguments, such as `enable_thinking` or `tools`.

        Raises PromptError for a tokenizer without character offsets, or for `chat` without a chat template, and
        ConfigError for `kwargs` under `plain`, or that are no arguments of a template.
        """
        if not tokenizer.is_fast:
            raise PromptError("The tokenizer has no character offsets, which the split needs. Load its fast version.")
        if kind == "chat" and not tokenizer.chat_template:
            raise PromptError(
                "The tokenizer has no chat template. Use template='plain', or set tokenizer.chat_template."
            )
        check_template_kwargs(kwargs or {}, kind)
        self.tokenizer = tokenizer
        self.kind = kind
        self.kwargs = dict(kwargs or {})

    def identity(self) -> str:
        """The hash that a fingerprint states as `template`: of the chat template, and of those arguments that change
        what stands before the query.

        An argument that changes only the end of a prompt, as thinking on or off does, is left out.
        """
        if not self.kwargs:
            return hash_template(self.tokenizer, {})
        before_query = self._before_query(self.kwargs)
        effective = {
            name: value
            for name, value in self.kwargs.items()
            if self._before_query({k: v for k, v in self.kwargs.items() if k != name}) != before_query
        }
        return hash_template(self.tokenizer, effective)

    def _before_query(self, kwargs: Mapping[str, Any]) -> list[str]:
        """What a prompt is before the query, for a memory of text and for one of turns; "" where it is refused."""
        texts = []
        for source in (_MEMORY_PROBE, _TURNS_PROBE):
            try:
                text = self._apply(self._messages(source, _QUERY_PROBE), kwargs)
            except PromptError:
                text = ""
            texts.append(text[: max(text.rfind(_QUERY_PROBE), 0)])
        return texts

    def memory_tokens(self, source: Source) -> MemoryTokens:
        """The tokens of a memory that are stored, cut before the first one that a query could change.

        Under `plain` the last word is left off, but at most `MOST_LEFT_OFF` tokens, as a word can be a whole text: in
        Chinese, Japanese and Thai, in JSON and in a URL. At least one token is stored.

        Raises PromptError for an empty text, or one of which the template leaves no token.
        """
        if not isinstance(source, str):
            check_turns("A memory", source)
        check_unicode("A memory", source)
        if not (source.strip() if isinstance(source, str) else source):
            raise PromptError("A memory of 0 characters can't be stored. Give it some text.")
        if self.kind == "plain" and not isinstance(source, str):
            raise PromptError("Chat turns need a chat template. Use template='chat', or give the turns as one text.")
        rendered = self._render(source, "" if self.kind == "plain" else _QUERY_PROBE)
        added = self.tokenizer.added_tokens_decoder
        barriers = [
            i
            for i, (token, (start, end)) in enumerate(zip(rendered.ids, rendered.spans, strict=True))
            if token in added and start >= rendered.memory_end and end <= rendered.query_start and end > start
        ]
        header = rendered.tokens_before(rendered.memory_start)
        memory_tokens = rendered.tokens_before(rendered.memory_end)
        if barriers:
            cut, body_end = barriers[-1] + 1, memory_tokens
        else:  # no special token separates memory and query, so a query can change the memory's last tokens
            last_word = rendered.memory_start + len(_before_last_word(rendered.memory_text))
            before_word = min(rendered.tokens_before(last_word), memory_tokens)
            cut = body_end = min(max(before_word, memory_tokens - MOST_LEFT_OFF, header + 1), memory_tokens)
        if cut <= header or not rendered.memory_text.strip():
            raise PromptError(
                f"The chat template of {self.tokenizer.name_or_path} leaves no token of the memory {_shown(source)}. "
                "Give it more text, or send it as part of the query."
            )
        return MemoryTokens(
            source=source,
            template=self.kind,
            token_ids=rendered.ids[:cut],
            header_tokens=header,
            body_end=min(body_end, cut),
            rest_ids=rendered.ids[body_end:memory_tokens],
        )

    def split(self, tokens: MemoryTokens, query: Query) -> TokenizedPrompt:
        """The prompt of a memory and `query`, split after the longest prefix that is in the memory's `token_ids`.

        Raises PromptError as `check_query`.
        """
        self.check_query(query)
        rendered = self._render(tokens.source, query)
        ids = rendered.ids
        if tokens.lead_ids:
            header = rendered.tokens_before(rendered.memory_start)
            ids = ids[:header] + tokens.lead_ids + ids[header:]
        shared = common_prefix(tokens.token_ids, ids)
        shared = min(shared, len(ids) - 1)  # the last token is always computed, because its logits are needed
        return TokenizedPrompt(ids[:shared], ids[shared:])

    def bare(self, query: Query) -> TokenizedPrompt:
        """The prompt of `query` without a memory. Raises PromptError as `check_query`."""
        self.check_query(query)
        if self.kind == "plain":
            return TokenizedPrompt((), tuple(self.tokenizer(query).input_ids))
        return TokenizedPrompt((), self._tokenize(self._apply(_turns(query)))[0])

    def separator_ids(self, text: str) -> tuple[int, ...]:
        """The tokens between two bodies of a merge."""
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def check_query(self, query: Query) -> None:
        """Raises PromptError for a query that is empty, neither a text nor turns, or turns under `plain`."""
        if not isinstance(query, str):
            check_turns("A query", query)
        check_unicode("A query", query)
        if not (query.strip() if isinstance(query, str) else query):
            raise PromptError("The query is empty. Ask something.")
        if self.kind == "plain" and not isinstance(query, str):
            raise PromptError("A query of chat turns needs a chat template. Use template='chat', or ask with a text.")

    def _render(self, source: Source, query: Query) -> _Rendered:
        if self.kind == "plain":
            assert isinstance(source, str) and isinstance(query, str)
            ids, spans = self._tokenize(source + query)
            return _Rendered(ids, spans, 0, len(source), len(source), source)
        text = self._apply(self._messages(source, query))
        if isinstance(source, str):
            before, behind = self._around(_MEMORY_PROBE, query)
            start, end = len(before), len(text) - len(behind)
            if not text.endswith(behind) or end < start:  # what is behind the memory depends on it
                end = start + len(source) if text.startswith(source, start) else start
        else:
            first, last = source[0]["content"].strip(), source[-1]["content"].strip()
            start = max(text.find(first), 0)
            _, behind = self._around((*source[:-1], {**source[-1], "content": _MEMORY_PROBE}), query)
            end = len(text) - len(behind)
            if not text.endswith(behind) or end < start:
                end = max(text.rfind(last, start), start) + len(last)
        query_start = text.rfind(_turns(query)[0]["content"].strip())
        if query_start < start:
            query_start = end
        end = min(end, query_start)
        ids, spans = self._tokenize(text)
        return _Rendered(ids, spans, start, end, query_start, text[start:end])

    def _around(self, source: Source, query: Query) -> tuple[str, str]:
        """What the template puts before and behind the placeholder memory in `source`.

        Raises PromptError for a template that leaves it out.
        """
        before, probe, behind = self._apply(self._messages(source, query)).partition(_MEMORY_PROBE)
        if not probe:
            raise PromptError(
                f"The chat template of {self.tokenizer.name_or_path} leaves out or rewrites the text of a turn. Use "
                "template='plain', or set tokenizer.chat_template."
            )
        return before, behind

    def _tokenize(self, text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        # A chat template writes BOS itself; to a plain text the tokenizer adds its special tokens.
        encoded = self.tokenizer(text, add_special_tokens=self.kind == "plain", return_offsets_mapping=True)
        return tuple(encoded.input_ids), tuple((start, end) for start, end in encoded.offset_mapping)

    def _messages(self, source: Source, query: Query) -> list[Message]:
        turns = _turns(query)
        if not isinstance(source, str):
            return [*source, *turns]
        if self._has_system_role:
            return [{"role": "system", "content": source}, *turns]
        return [{**turns[0], "content": f"{source}\n\n{turns[0]['content']}"}, *turns[1:]]

    @cached_property
    def _has_system_role(self) -> bool:
        """False if the template refuses a system turn or omits it."""
        try:
            text = self._apply([{"role": "system", "content": _MEMORY_PROBE}, *_turns(_QUERY_PROBE)])
        except PromptError:
            return False
        return _MEMORY_PROBE in text

    @cached_property
    def _takes_parts(self) -> bool:
        """True if the template takes a content as a list of parts, and leaves out or refuses a text."""
        for takes_parts in (False, True):
            try:
                if _QUERY_PROBE in self._apply(_turns(_QUERY_PROBE), takes_parts=takes_parts):
                    return takes_parts
            except PromptError:
                continue
        return False

    def _apply(
        self, messages: list[Message], kwargs: Mapping[str, Any] | None = None, takes_parts: bool | None = None
    ) -> str:
        """The text of `messages`. kwargs, takes_parts: instead of this template's own."""
        turns: list[Any] = messages
        if self._takes_parts if takes_parts is None else takes_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        arguments = self.kwargs if kwargs is None else dict(kwargs)
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **arguments)
        except _RENDERING_ERRORS as error:
            roles = ", ".join(message["role"] for message in messages)
            given = f" with the arguments {', '.join(arguments)}" if arguments else ""
            reason = str(error) or type(error).__name__
            raise PromptError(
                f"The chat template refuses turns of the roles {roles}{given}: {reason}. Arguments that it needs, such "
                "as tools, are chat_template_kwargs."
            ) from error
        assert isinstance(text, str)  # tokenize=False
        return text


def check_template_kwargs(kwargs: Mapping[str, Any], kind: TemplateKind) -> None:
    """Raises ConfigError for arguments of a chat template under `plain`, for one that transformers takes itself, and
    for one that is not JSON, as a file states its hash."""
    if kwargs and kind == "plain":
        raise ConfigError(
            "chat_template_kwargs are arguments of a chat template. Use template='chat', or leave them out."
        )
    if taken := sorted(TAKEN_ARGUMENTS & kwargs.keys()):
        raise ConfigError(
            f"chat_template_kwargs names {', '.join(taken)}, which is set here and is not the template's. Leave it out."
        )
    for name, value in kwargs.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"chat_template_kwargs[{name!r}] is not JSON ({error}). Give plain values; tools as their JSON schemas."
            ) from error


def check_turns(what: str, given: object) -> None:
    """Raises PromptError unless `given` is a list of turns, each with a text as role and as content.

    `what` starts the message, as a subject.
    """
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise PromptError(f"{what} is a text or a list of chat turns, and got a {type(given).__name__}.")
    for turn in given:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise PromptError(f'A turn is {{"role": a text, "content": a text}}, and got {turn!r}.')


def check_unicode(what: str, given: Source | Query) -> None:
    """Raises PromptError if the text, or that of a turn, has a lone surrogate. `what` starts the message."""
    for text in [given] if isinstance(given, str) else [turn[key] for turn in given for key in ("role", "content")]:
        fault = text_fault(text)
        if fault:
            raise PromptError(f"{what} {fault}. Decode the text with errors='replace'.")


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _before_last_word(text: str) -> str:
    return text.rstrip().removesuffix("".join(text.split()[-1:])).rstrip()


def _shown(source: Source) -> str:
    text = source if isinstance(source, str) else source[-1]["content"]
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")


def _turns(query: Query) -> list[Message]:
    return [{"role": "user", "content": query}] if isinstance(query, str) else list(query)
