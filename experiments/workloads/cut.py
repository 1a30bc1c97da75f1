"""Cuts natural text to exact token counts, as the template's verified split counts them.

Every count is taken on the whole rendered prompt, because the text alone determines neither the template's own tokens
nor the tokens where two texts meet. So this works for any tokenizer, and the counts of every cell are verified.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence

from transformers import DynamicCache

from kvmem.cache import KVCacheItem, KVCacheMetadata, MemoryTokens, Source
from kvmem.errors import PromptError
from kvmem.merge import merged_tokens
from kvmem.prompt import PromptTemplate

Count = Callable[[str], int]
"""The number of the prompt's tokens that belong to a text."""

SHORTEST_WORDS = 3
BASES_TRIED = 8
"""How many word ends below the target are tried before the target counts as unreachable."""

QUESTIONS_TRIED = 12
SEAM_TOKENS = 4
"""The largest difference between the token counts of a text alone and within a prompt."""

# Most vocabularies have one token for each. The words form a phrase; the entries at the end are for small vocabularies.
_MEMORY_FILLERS = (" and", " so", " on", " in", " the", " next", " part", " of", " it", " a", " I", ".", ",", " -", "e")
_QUESTION_FILLERS = (" Thanks", " for", " your", " help", ".", "!", "?", " I", " a", "e")

_LEADS = (
    "",
    "Briefly: ",
    "A question: ",
    "One question, please: ",
    "Here is my question: ",
    "I have read all of the text. ",
    "I have read all of the text, and one thing is not clear to me. ",
    "Thank you for the text. I have read all of it twice, and one thing is still not quite clear to me. ",
)
_TAILS = (
    "",
    " Be brief.",
    " Answer in one sentence.",
    " Answer in one short sentence, please.",
    " Please answer from the text only.",
    " Please answer from the text only, and say where in it the answer stands.",
)


def memory_tokens(template: PromptTemplate, memories: Sequence[Source], separator: str) -> MemoryTokens:
    """The tokens that the cache of `memories`, alone or merged, would hold. It builds no cache."""
    tokens = [template.memory_tokens(memory) for memory in memories]
    if len(tokens) == 1:
        return tokens[0]
    return merged_tokens([_tokens_only(part) for part in tokens], template.separator_ids(separator))


def _tokens_only(tokens: MemoryTokens) -> KVCacheItem:
    return KVCacheItem(DynamicCache(), KVCacheMetadata(tokens=tokens, build_s=0.0, kv_bytes=0, fingerprint=None))


def as_query(template: PromptTemplate, question: str) -> str:
    """The question in the form that the template needs.

    The template `plain` has no turns, so the text itself separates the question from the memory.
    """
    return question if template.kind == "chat" else f"\n\nQuestion: {question}\nAnswer:"


def cut(text: str, target: int, count: Count, what: str, fillers: Sequence[str] = _MEMORY_FILLERS) -> str:
    """The beginning of `text`, cut after a word, for which `count` returns exactly `target` tokens.

    If no word ends exactly at the target, the text ends earlier, and a few filler words are added. `what` names the
    knob in errors. Raises PromptError, with the possible counts, if the target is out of reach.
    """
    ends = [word.end() for word in re.finditer(r"\S+", text)][
        : target + SHORTEST_WORDS + 1
    ]  # a word is a token or more
    if len(ends) < SHORTEST_WORDS:
        raise PromptError(f"{what}: {len(ends)} words can't be cut to {target} tokens. Provide a longer text.")
    heads = [text[:end] for end in ends[SHORTEST_WORDS - 1 :]]
    if (least := count(heads[0])) > target:
        raise PromptError(
            f"{what}: {target} tokens can't be reached, because the template and {SHORTEST_WORDS} words already take "
            f"{least}. Choose {least} or more."
        )
    if (most := count(heads[-1])) < target:
        raise PromptError(
            f"{what}: {target} tokens can't be reached, because the whole text has {most}. Choose {most} or less."
        )
    above = bisect.bisect_right(heads, target, key=count)
    for head in reversed(heads[max(above - BASES_TRIED, 0) : above]):
        filled = _fill(head, target, count, fillers)
        if filled is not None:
            return filled
    raise PromptError(
        f"{what}: exactly {target} tokens can't be reached with this tokenizer. Choose a few more or less."
    )


def _fill(text: str, target: int, count: Count, fillers: Sequence[str]) -> str | None:
    """`text` followed by filler words, so that `count` returns `target`; None if no fillers reach it."""
    tokens, step = count(text), 0
    while tokens < target:
        grown = None
        for i in range(len(fillers)):
            longer = text + fillers[(step + i) % len(fillers)]
            longer_tokens = count(longer)
            if tokens < longer_tokens <= target and (grown is None or longer_tokens < grown[0]):
                grown = longer_tokens, longer
                if longer_tokens in (tokens + 1, target):
                    break
        if grown is None:
            return None
        tokens, text = grown
        step += 1
    return text if tokens == target else None


def cut_memories(
    texts: Sequence[str], context_tokens: int, template: PromptTemplate, separator: str, what: str
) -> tuple[str, ...]:
    """The beginnings of `texts`, about equally long, whose merged cache holds exactly `context_tokens` tokens.

    Each text is cut so that the memories up to it hold their share of the tokens. `what` names the knob in errors.
    Raises PromptError if a count is out of reach.
    """
    probe = as_query(template, "What is it?")
    done: tuple[str, ...] = ()
    for i, text in enumerate(texts):
        share = context_tokens * (i + 1) // len(texts)

        def count(head: str, before: tuple[str, ...] = done) -> int:
            return len(template.split(memory_tokens(template, (*before, head), separator), probe).memory_ids)

        done += (cut(text, share, count, f"{what}.context_tokens={context_tokens}, memory {i + 1} of {len(texts)}"),)
    return done


def cut_question(
    variants: Sequence[str],
    passage: str,
    query_tokens: int,
    context_tokens: int,
    tokens: MemoryTokens,
    template: PromptTemplate,
    what: str,
) -> str:
    """A question of exactly `query_tokens` tokens after a memory of `context_tokens` tokens, as text for the template.

    The question is one of `variants`, with a few words before or after it. A long question quotes from `passage`.
    `what` names the knob in errors. Raises PromptError, with the counts, if the shortest variant is too long or the
    passage is too short.
    """
    counted: dict[str, int] = {}

    def count(question: str) -> int:
        if question not in counted:
            counted[question] = len(template.split(tokens, as_query(template, question)).query_ids)
        return counted[question]

    def checked(question: str) -> str | None:
        prompt = template.split(tokens, as_query(template, question))
        exact = (len(prompt.memory_ids), len(prompt.query_ids)) == (context_tokens, query_tokens)
        return as_query(template, question) if exact else None

    what = f"{what}.query_tokens={query_tokens}"
    shortest = min(variants, key=len)
    if (least := count(shortest)) > query_tokens:
        raise PromptError(
            f"{what}: {query_tokens} tokens can't be reached, because the template and the shortest question "
            f"({shortest!r}) already take {least}. Choose {least} or more."
        )
    candidates = [lead + variant + tail for lead in _LEADS for variant in variants for tail in _TAILS]
    template_tokens = least - _tokens_alone(template, shortest)
    estimates = {text: _tokens_alone(template, text) + template_tokens for text in candidates}
    near = sorted(candidates, key=lambda text: abs(estimates[text] - query_tokens))[:QUESTIONS_TRIED]
    for question in near:
        close = abs(estimates[question] - query_tokens) <= SEAM_TOKENS
        if close and count(question) == query_tokens and (text := checked(question)):
            return text
    words = " ".join(passage.split()[: query_tokens + SHORTEST_WORDS])
    for variant in variants:

        def quoting(excerpt: str, variant: str = variant) -> str:
            return f'Here is a note about something else: "{excerpt} ..." Now my question: {variant}'

        if count(quoting(" ".join(words.split()[:SHORTEST_WORDS]))) <= query_tokens:

            def count_quoting(head: str, quoting: Callable[[str], str] = quoting) -> int:
                return count(quoting(head))

            excerpt = cut(words, query_tokens, count_quoting, what)
            if text := checked(quoting(excerpt)):
                return text
    for question in [*near, shortest]:
        filled = _fill(question, query_tokens, count, _QUESTION_FILLERS)
        if filled is not None and (text := checked(filled)):
            return text
    raise PromptError(
        f"{what} after {context_tokens} tokens of memory: this tokenizer allows no question of exactly that length. "
        "Choose a few more or less."
    )


def _tokens_alone(template: PromptTemplate, text: str) -> int:
    return len(template.tokenizer(text, add_special_tokens=False).input_ids)
