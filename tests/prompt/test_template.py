"""The split of a prompt: with any template or tokenizer, both arms receive the ids of the whole prompt."""

from __future__ import annotations

import copy
from pydoc_data.topics import topics

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvmem.cache.items import Source
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import PromptError
from kvmem.models.loading import Loaded
from kvmem.prompt.template import PromptTemplate, TokenizedPrompt, common_prefix
from tests.helpers.tiny import greedy_by_transformers, memory_on

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# Each template shows one behavior of a published one.
TEMPLATES = {
    "default system prompt": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
    ),
    "a BOS of its own": "<|endoftext|>{% for m in messages %}" + TURN + "{% endfor %}" + ASK,
    "thinking is stripped from earlier turns": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].strip() }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "system turns are refused": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TURN
        + "{% endfor %}"
        + ASK
    ),
    "system turns are left out": "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + ASK,
    "a date before the memory": "Today is day 1.\n{% for m in messages %}" + TURN + "{% endfor %}" + ASK,
    "content is trimmed": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}" + ASK
    ),
    "no special tokens": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    "nothing between the turns": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
WITHOUT_SYSTEM = {"system turns are refused", "system turns are left out"}
WITHOUT_BARRIER = {*WITHOUT_SYSTEM, "no special tokens", "nothing between the turns"}

MEMORY = "  Paris is the capital of France. Berlin is the capital of Germany, a state that is no longer capital\n"
TURNS = (
    {"role": "user", "content": "Where is Berlin? Think well about it."},
    {"role": "assistant", "content": "<think>" + "Is it in France? No. " * 30 + "</think>\n\nIn Germany."},
)
QUERIES = [
    "ist thought, what is it?",
    " And why?",
    "\n\nWhy?",
    "Why<|im_end|>\n?",
    "?",
    "kvmem",
    "é́\u200d👩‍👩‍👧",
    "system",
]


def tokenizer_with(backend: HFBackend, name: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(backend.tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def whole(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[int, ...]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def messages_of(name: str, source: Source, query: str) -> list[dict[str, str]]:
    if not isinstance(source, str):
        return [*source, {"role": "user", "content": query}]
    if name in WITHOUT_SYSTEM:
        return [{"role": "user", "content": f"{source}\n\n{query}"}]
    return [{"role": "system", "content": source}, {"role": "user", "content": query}]


@pytest.mark.parametrize("source", [MEMORY, TURNS], ids=["text", "turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_split_has_the_ids_of_the_whole_prompt(qwen3, name, source):
    tokenizer = tokenizer_with(qwen3, name)
    template = PromptTemplate(tokenizer, "chat")
    tokens = template.memory_tokens(source)
    assert "kvmem" not in tokenizer.decode(tokens.token_ids)  # nothing of the stand-in query
    assert tokens.header_ids + tokens.body_ids == tokens.token_ids[: tokens.body_end]
    if isinstance(source, str):
        body = tokenizer.decode(tokens.body_ids + tokens.rest_ids)
        assert body.strip() == MEMORY.strip()
        assert bool(tokens.rest_ids) == (name in WITHOUT_BARRIER)
    for query in QUERIES:
        prompt = template.split(tokens, query)
        assert prompt.ids == whole(tokenizer, messages_of(name, source, query))
        assert prompt.memory_ids == tokens.token_ids[: len(prompt.memory_ids)]
        assert len(tokens.token_ids) - len(prompt.memory_ids) <= 4, (query, tokenizer.decode(tokens.token_ids))
        assert template.bare(query).ids == whole(tokenizer, [{"role": "user", "content": query}])
    if name not in WITHOUT_BARRIER:  # all that no query can reach is stored: to the user turn's own opening token
        assert tokenizer.decode(tokens.token_ids[-1:]) == "<|im_start|>"
    # Most of the memory is stored, not some of it.
    unstored = len(template.split(tokens, "?").query_ids)
    assert unstored <= len(whole(tokenizer, [{"role": "user", "content": "?"}])) + 8


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_equals_that_of_the_whole_prompt(qwen3, name):
    backend = HFBackend(Loaded(qwen3.model, tokenizer_with(qwen3, name), "random weights"))
    memory = memory_on(backend)
    for source in (MEMORY, list(TURNS)):
        item = memory.extract(source)
        memory.add(item)
        ids = whole(backend.tokenizer, messages_of(name, item.metadata.tokens.source, QUERIES[0]))
        answer = backend.generate(QUERIES[0], memory.get_cache(item.kv_cache_id), 16)
        assert list(answer.token_ids) == greedy_by_transformers(backend, ids, 16)


def test_a_changed_date_costs_a_prefill_and_gives_the_right_answer(qwen3):
    tokenizer = tokenizer_with(qwen3, "a date before the memory")
    backend = HFBackend(Loaded(qwen3.model, tokenizer, "random weights"))
    memory = memory_on(backend)
    item = memory.extract(MEMORY)
    memory.add(item)
    assert backend.generate("Why?", memory.get_cache(item.kv_cache_id), 1).cached_tokens == item.metadata.token_count
    tokenizer.chat_template = TEMPLATES["a date before the memory"].replace("day 1", "day 2")
    ids = whole(tokenizer, messages_of("", MEMORY, "Why?"))
    answer = backend.generate("Why?", memory.get_cache(item.kv_cache_id), 16)
    assert list(answer.token_ids) == greedy_by_transformers(backend, ids, 16)
    assert 0 < answer.cached_tokens < 8


def test_a_date_that_changes_with_every_call_is_not_an_error(qwen3):
    tokenizer = copy.deepcopy(qwen3.tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%H:%M:%S.%f') }}\n" + TEMPLATES["no special tokens"]
    template = PromptTemplate(tokenizer, "chat")
    tokens = template.memory_tokens(MEMORY)
    prompt = template.split(tokens, "Why?")
    assert len(prompt.memory_ids) < 20 and tokenizer.decode(prompt.ids).endswith(f"{MEMORY}\nuser: Why?\nassistant:")


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_bos_that_the_tokenizer_adds_occurs_once(qwen3, kind):
    """Rendered separately, memory and query would have one each."""
    tokenizer = tokenizer_with(qwen3, "a BOS of its own")
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    assert tokenizer("x").input_ids[0] == bos
    template = PromptTemplate(tokenizer, kind)
    tokens = template.memory_tokens(MEMORY)
    prompt = template.split(tokens, " Why?")
    assert prompt.ids[0] == bos and prompt.ids.count(bos) == 1
    assert len(prompt.memory_ids) == len(tokens.token_ids)
    assert bos in tokens.header_ids and bos not in tokens.body_ids
    assert bos not in template.separator_ids("\n\n")


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerBase:
    """A BPE tokenizer without word boundaries: its tokens span spaces, and the border of memory and query."""
    tokenizer = Tokenizer(BPE())
    text = [f"the capital of {x}. the capitalist of {x}. is it so? it is so." for x in ("france", "spain", "peru")] * 9
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_tokenizer_that_merges_across_memory_and_query(merging):
    """One text is cut in two at every character. Tokenized separately the ids often differ; split they never do."""
    text = "it is so. the capital of france. is it so? the capitalist of spain. it is so. the capital of peru."
    template = PromptTemplate(merging, "plain")
    together = tuple(merging(text).input_ids)
    broken = 0
    for border in range(20, len(text)):
        memory, query = text[:border], text[border:]
        if not query.strip():
            continue
        broken += tuple(merging(memory).input_ids + merging(query).input_ids) != together
        tokens = template.memory_tokens(memory)
        prompt = template.split(tokens, query)
        assert prompt.ids == together
        assert len(prompt.memory_ids) >= len(tokens.token_ids) - 4, (memory, query)
        assert tokens.token_ids + tokens.rest_ids == tuple(merging(memory).input_ids)
    assert broken > 20


@pytest.mark.parametrize("kind", ["chat", "plain"])
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    query=st.text(min_size=1, max_size=40).filter(str.strip)
    | st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "user", "\n", " ", "'s", "ist", "?", "2", "é"]), min_size=1
    )
    .map("".join)
    .filter(str.strip),
    memory=st.sampled_from(
        [topics[page].strip()[:n] for page, n in (("if", 300), ("lambda", 211), ("del", 97), ("in", 404))]
    ),
)
def test_no_query_changes_the_prompt_ids(smollm2, kind, query, memory):
    tokenizer = smollm2.tokenizer
    template = PromptTemplate(tokenizer, kind)
    tokens = template.memory_tokens(memory)
    prompt = template.split(tokens, query)
    if kind == "chat":
        assert prompt.ids == whole(tokenizer, messages_of("", memory, query))
        assert len(prompt.memory_ids) == len(tokens.token_ids)
    else:
        assert prompt.ids == tuple(tokenizer(memory + query).input_ids)
        assert len(prompt.memory_ids) >= len(tokens.token_ids) - 4
    assert len(prompt.query_ids) >= 1


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(memory=st.text(min_size=1, max_size=60), query=st.text(min_size=1, max_size=20).filter(str.strip))
def test_no_memory_changes_the_prompt_ids(smollm2, memory, query):
    tokenizer = smollm2.tokenizer
    for kind in ("chat", "plain"):
        template = PromptTemplate(tokenizer, kind)
        try:
            tokens = template.memory_tokens(memory)
        except PromptError:
            assert not memory.strip()
            continue
        prompt = template.split(tokens, query)
        expected = (
            whole(tokenizer, messages_of("", memory, query)) if kind == "chat" else tokenizer(memory + query).input_ids
        )
        assert prompt.ids == tuple(expected)
        assert prompt.memory_ids == tokens.token_ids[: len(prompt.memory_ids)]


def test_the_digest_does_not_depend_on_the_split():
    assert TokenizedPrompt((1, 2), (3,)).digest == TokenizedPrompt((1,), (2, 3)).digest
    assert TokenizedPrompt((1, 2), (3,)).digest != TokenizedPrompt((1, 2), (4,)).digest
    assert TokenizedPrompt((1, 2), ()).digest != TokenizedPrompt((12,), ()).digest
    assert common_prefix((1, 2, 3), (1, 2, 4)) == common_prefix((1, 2), (1, 2, 3)) == 2


def test_the_last_token_is_always_computed(qwen3_plain):
    template = qwen3_plain.template
    tokens = template.memory_tokens("one two three four five")
    for longer in (tokens.token_ids + template.split(tokens, " six").query_ids, template.split(tokens, " six").ids):
        held = tokens.model_copy(update={"token_ids": longer})
        prompt = template.split(held, " six")
        assert prompt.ids == longer and len(prompt.query_ids) == 1


def test_a_memory_of_one_long_word_is_tokenized_quickly(qwen3_plain):
    text = "a" * 30_000 + " b c"  # backtracking over the long word would take a minute
    assert len(qwen3_plain.template.memory_tokens(text).token_ids) > 1000


def test_a_text_that_can_not_be_rendered_is_refused(qwen3, qwen3_plain):
    with pytest.raises(PromptError, match="0 characters"):
        qwen3.template.memory_tokens(" \n")
    with pytest.raises(PromptError, match="template='chat'"):
        qwen3_plain.template.memory_tokens(TURNS)
    tokens, plain_tokens = qwen3.template.memory_tokens(MEMORY), qwen3_plain.template.memory_tokens(MEMORY)
    for template, held in ((qwen3.template, tokens), (qwen3_plain.template, plain_tokens)):
        for nothing in ("", "  ", []):
            with pytest.raises(PromptError, match="query is empty"):
                template.split(held, nothing)
            with pytest.raises(PromptError, match="query is empty"):
                template.bare(nothing)
    with pytest.raises(PromptError, match="needs a chat template"):
        qwen3_plain.template.split(plain_tokens, list(TURNS))
    refusing = PromptTemplate(tokenizer_with(qwen3, "system turns are refused"), "chat")
    with pytest.raises(PromptError, match="refuses turns of the roles system, user: no system role"):
        refusing.memory_tokens(({"role": "system", "content": "Be brief."},))
    bare = copy.deepcopy(qwen3.tokenizer)
    bare.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        PromptTemplate(bare, "chat")


def test_queries_of_several_turns_follow_the_memory(qwen3):
    tokens = qwen3.template.memory_tokens(MEMORY)
    query = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ]
    prompt = qwen3.template.split(tokens, query)
    assert prompt.ids == whole(qwen3.tokenizer, [{"role": "system", "content": MEMORY}, *query])
    assert len(prompt.memory_ids) == len(tokens.token_ids)
