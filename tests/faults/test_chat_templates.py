"""Chat templates that take parts, take arguments, raise, escape, or leave the memory out: they work or are named."""

from __future__ import annotations

import copy
import html

import pytest
from transformers import PreTrainedTokenizerBase

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.errors import ConfigError, FingerprintError, PromptError
from kvmem.models.loading import Loaded
from kvmem.prompt import PromptTemplate
from tests.helpers.tiny import greedy_by_transformers, memory_on

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
AS_TEXT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
AS_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}" + ASK
)
FIRST_PART = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0]['text'] }}<|im_end|>\n{% endfor %}" + ASK
ESCAPED = AS_TEXT.replace("m.content", "m.content | e")
AS_JSON = "{% for m in messages %}{{ m.role }}: {{ m.content | tojson }}\n{% endfor %}assistant: "
THINKING = AS_TEXT + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}" + AS_TEXT
NEEDED = "{% if not tools %}{{ raise_exception('give me tools') }}{% endif %}" + TOOLS

MEMORY = "The <b>capital</b> of France & its river are \"Paris\" and 'Seine'; 3 < 4 > 2 holds there."
TURNS = [
    {"role": "user", "content": "Is 3 < 4 & 5 > 4?"},
    {"role": "assistant", "content": "Yes: <b>both</b> & more."},
]
QUERIES = ["Which <river>?", "Why & how?", "?"]
TOOL = {"type": "function", "function": {"name": "river_of", "parameters": {"type": "object", "properties": {}}}}


def tokenizer_with(backend: HFBackend, template: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(backend.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def backend_with(qwen3: HFBackend, template: str, **kwargs: object) -> HFBackend:
    loaded = Loaded(qwen3.model, tokenizer_with(qwen3, template), "random weights")
    return HFBackend(loaded, chat_template_kwargs=kwargs)


def whole(tokenizer: PreTrainedTokenizerBase, turns: list, in_parts: bool = False, **kwargs: object) -> tuple[int, ...]:
    """The token ids of the whole prompt, by transformers alone."""
    if in_parts:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("source", [MEMORY, TURNS], ids=["text", "turns"])
@pytest.mark.parametrize("template", [AS_PARTS, FIRST_PART, ESCAPED, AS_JSON], ids=["parts", "first", "html", "json"])
def test_parts_and_escapes_answer_as_the_whole_prompt(qwen3, template, source):
    backend = backend_with(qwen3, template)
    memory = memory_on(backend)
    item = memory.extract(source)
    memory.add(item)
    earlier = [{"role": "system", "content": source}] if isinstance(source, str) else source
    for query in QUERIES:
        turns = [*earlier, {"role": "user", "content": query}]
        ids = whole(backend.tokenizer, turns, template in (AS_PARTS, FIRST_PART))
        view = memory.get_cache(item.kv_cache_id)
        assert backend.split(query, view).ids == ids
        answer = backend.generate(query, view, 8)
        assert list(answer.token_ids) == greedy_by_transformers(backend, ids, 8)
        assert answer.cached_tokens >= item.metadata.token_count - 3


@pytest.mark.parametrize("template", [ESCAPED, AS_JSON, AS_PARTS], ids=["html", "json", "parts"])
def test_the_body_is_the_memory_as_it_is_rendered(qwen3, template):
    """A merge joins bodies: an empty body would leave a memory out without a word."""
    tokenizer = tokenizer_with(qwen3, template)
    tokens = PromptTemplate(tokenizer, "chat").memory_tokens(MEMORY)
    body = tokenizer.decode(tokens.body_ids + tokens.rest_ids)
    shown = html.unescape(body).strip('"').replace('\\"', '"')
    assert shown in (MEMORY, MEMORY[:-1])  # in JSON the full stop shares a token with the closing quote


def test_a_merge_of_escaped_memories_has_both(qwen3):
    backend = backend_with(qwen3, ESCAPED)
    memory = memory_on(backend)
    items = memory.extract([MEMORY, "Rome & <Tiber>."])
    memory.add(items)
    prompt = backend.split("Why?", memory.get_cache([item.kv_cache_id for item in items]))
    text = backend.tokenizer.decode(prompt.ids)
    assert html.escape("Rome & <Tiber>.") in text and "Seine" in text


def test_an_argument_of_the_end_changes_the_prompt_and_not_the_identity(qwen3):
    """A memory that was built with thinking on serves with thinking off: the switch stands behind the query."""
    on, off = backend_with(qwen3, THINKING), backend_with(qwen3, THINKING, enable_thinking=False)
    assert on.fingerprint == off.fingerprint
    memory_off = memory_on(off)
    item = memory_on(on).extract(MEMORY)
    memory_off.add(item)
    turns = [{"role": "system", "content": MEMORY}, {"role": "user", "content": "Why?"}]
    ids = whole(off.tokenizer, turns, enable_thinking=False)
    assert ids != whole(off.tokenizer, turns)
    answer = off.generate("Why?", memory_off.get_cache(item.kv_cache_id), 8)
    assert list(answer.token_ids) == greedy_by_transformers(off, ids, 8)
    assert answer.cached_tokens == item.metadata.token_count


def test_arguments_before_the_memory_are_part_of_the_identity(qwen3, tmp_path):
    without, with_tools = backend_with(qwen3, TOOLS), backend_with(qwen3, TOOLS, tools=[TOOL], enable_thinking=True)
    memory = memory_on(with_tools)
    item = memory.extract(MEMORY)
    memory.add(item)
    turns = [{"role": "system", "content": MEMORY}, {"role": "user", "content": "Why?"}]
    ids = whole(with_tools.tokenizer, turns, tools=[TOOL])
    answer = with_tools.generate("Why?", memory.get_cache(item.kv_cache_id), 8)
    assert list(answer.token_ids) == greedy_by_transformers(with_tools, ids, 8)
    assert answer.cached_tokens == item.metadata.token_count
    memory.dump(tmp_path)
    assert memory.load(tmp_path) == 1
    other = memory_on(without)
    for refused in (lambda: other.load(tmp_path), lambda: other.add(item)):
        with pytest.raises(FingerprintError, match="template"):
            refused()
    assert backend_with(qwen3, TOOLS, tools=[TOOL]).fingerprint == with_tools.fingerprint
    assert backend_with(qwen3, TOOLS, tools=[{**TOOL, "type": "x"}]).fingerprint != with_tools.fingerprint


def test_a_template_that_needs_arguments_says_so_and_works_with_them(qwen3):
    with pytest.raises(PromptError, match=r"give me tools.*chat_template_kwargs"):
        memory_on(backend_with(qwen3, NEEDED)).extract(MEMORY)
    memory_on(backend_with(qwen3, NEEDED, tools=[TOOL])).extract(MEMORY)


@pytest.mark.parametrize(
    "raising",
    [
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[9].content }}",
        "{{ messages[0].content.no.such }}",
        "{{ no_such_function() }}",
        "{{ messages[0].content | no_such_filter }}",
        "{% for m in messages %}",
        "{{ 'x'.join(3) }}",
        "{{ 'é'.encode('ascii') }}",
        "{{ range(10 ** 9) }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_that_raises_is_a_named_error(qwen3, raising):
    backend = backend_with(qwen3, raising + AS_TEXT)
    for use in (lambda: memory_on(backend).extract(MEMORY), lambda: backend.generate("Why?", None, 2)):
        with pytest.raises(PromptError, match="The chat template refuses turns of the roles"):
            use()


@pytest.mark.parametrize(
    "template", ["Hello.", "{% for m in messages %}{{ m.content | upper }}{% endfor %}"], ids=["constant", "rewritten"]
)
def test_a_template_that_leaves_the_text_out_is_a_named_error(qwen3, template):
    with pytest.raises(PromptError, match="leaves out or rewrites the text"):
        memory_on(backend_with(qwen3, template)).extract(MEMORY)


def test_a_memory_that_the_template_drops_is_refused(qwen3):
    """Its file would hold the header alone, and every answer would be one without the memory."""
    dropping = AS_TEXT.replace("{{ m.content }}", "{% if 'secret' not in m.content %}{{ m.content }}{% endif %}")
    memory = memory_on(backend_with(qwen3, dropping))
    memory.extract(MEMORY)
    with pytest.raises(PromptError, match="leaves no token of the memory 'A secret memory"):
        memory.extract("A secret memory.")


@pytest.mark.parametrize(
    ("kwargs", "template", "message"),
    [
        ({"tools": [len]}, "chat", "not JSON"),
        ({"tokenize": True}, "chat", "names tokenize"),
        ({"chat_template": "x"}, "chat", "names chat_template"),
        ({"enable_thinking": False}, "plain", "template='chat'"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_loads(qwen3, kwargs, template, message):
    with pytest.raises(ConfigError, match=message):
        PromptTemplate(qwen3.tokenizer, template, kwargs)
    with pytest.raises(ConfigError, match=message):
        KVCacheMemoryConfig(
            extractor_llm={"backend": "huggingface", "config": {}}, template=template, chat_template_kwargs=kwargs
        )


def test_arguments_reach_the_engine_by_the_configuration(qwen3):
    config = KVCacheMemoryConfig(
        extractor_llm={"backend": "huggingface", "config": {"model_name_or_path": "random:tiny", "device": "cpu"}},
        chat_template_kwargs={"enable_thinking": False},
    )
    assert KVCacheMemory(config).backend.template.kwargs == {"enable_thinking": False}
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        KVCacheMemory(config, qwen3)


def test_named_templates_have_an_identity(qwen3):
    tokenizer = tokenizer_with(qwen3, AS_TEXT)
    tokenizer.chat_template = {"default": AS_TEXT, "tool_use": TOOLS}
    backend = HFBackend(Loaded(qwen3.model, tokenizer, "random weights"))
    memory_on(backend).extract(MEMORY)
    assert backend.fingerprint.template != backend_with(qwen3, AS_TEXT).fingerprint.template
