"""chat_template_kwargs on vLLM: the same token ids and the same answers as on the Hugging Face engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from kvmem import KVCacheMemory, KVCacheMemoryConfig
from kvmem.cache import hash_template
from kvmem.engines.huggingface.backend import HFBackend
from kvmem.engines.vllm.backend import VLLMBackend
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.engines.vllm.server.backend import VLLMServerBackend
from kvmem.engines.vllm.server.config import VLLMServerConfig
from kvmem.errors import ConfigError
from kvmem.models.loading import Loaded, load_tokenizer
from tests.helpers.tiny import pairs
from tests.vllm.conftest import SETTINGS, skip_without_vllm
from tests.vllm.serving import KEY_VARIABLE, MODEL

CARD = "kvmem_server.json"
pytestmark = pytest.mark.timeout(420)

THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
TOOL = {"type": "function", "function": {"name": "river_of", "parameters": {"type": "object", "properties": {}}}}
KWARGS = {"tools": [TOOL], "enable_thinking": False}
TEXT, QUERY = pairs(1, 900, seed=41)[0]
TURNS = [
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": "I see."},
    {"role": "user", "content": QUERY},
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's tokenizer, with a chat template that takes tools and a switch for thinking."""
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = TOOLS + tokenizer.chat_template + THINKING
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(smollm2: HFBackend, tokenizer_folder: Path) -> HFBackend:
    loaded = Loaded(smollm2.model, load_tokenizer(str(tokenizer_folder)), smollm2.fingerprint.origin)
    return HFBackend(loaded, chat_template_kwargs=KWARGS)


def whole(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **kwargs: object) -> tuple[int, ...]:
    """The token ids of the whole prompt, by transformers alone."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def check_same(ours: VLLMBackend | VLLMServerBackend, reference: HFBackend) -> None:
    ids = whole(reference.tokenizer, TURNS, **KWARGS)
    assert ids != whole(reference.tokenizer, TURNS), "the arguments matter"
    assert ours.split(TURNS).ids == reference.split(TURNS).ids == ids
    direct = [backend.generate(TURNS, None, 8) for backend in (ours, reference)]
    assert direct[0].token_ids == direct[1].token_ids and direct[0].prompt_tokens == len(ids)
    with_memory = []
    for backend in (ours, reference):
        config = KVCacheMemoryConfig(extractor_llm={"backend": backend.name, "config": {}}, chat_template_kwargs=KWARGS)
        memory = KVCacheMemory(config, backend)
        item = memory.extract(TURNS[:2])
        memory.add(item)
        view = memory.get_cache(item.kv_cache_id)
        answer = backend.generate(QUERY, view, 8)
        assert backend.split(QUERY, view).ids == ids and answer.cached_tokens > 0
        with_memory.append((item.metadata.tokens.token_ids, answer.token_ids))
    assert with_memory[0] == with_memory[1] and with_memory[0][1] == direct[1].token_ids


@pytest.mark.xdist_group("engine")
def test_the_engine_gives_them_to_the_template(reference: HFBackend, tokenizer_folder: Path) -> None:
    skip_without_vllm()
    config = VLLMConfig(**{**SETTINGS, "kv_cache_gib": 0.25}, tokenizer_name_or_path=str(tokenizer_folder))
    check_same(VLLMBackend.open(config, "chat", KWARGS), reference)


def test_the_server_is_sent_what_the_template_gives(url: str, reference: HFBackend, tokenizer_folder: Path) -> None:
    config = VLLMServerConfig(
        base_url=url, model=MODEL, api_key_env=KEY_VARIABLE, tokenizer_name_or_path=str(tokenizer_folder)
    )
    check_same(VLLMServerBackend.open(config, "chat", KWARGS), reference)


@pytest.fixture
def store_of_this_template(url: str, store: Path, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A store as of a server that was started with this chat template."""
    card = json.loads((store / CARD).read_text())
    card["fingerprint"]["template"] = hash_template(load_tokenizer(str(tokenizer_folder)), {})
    (tmp_path / CARD).write_text(json.dumps(card))
    return tmp_path


def test_a_server_with_a_store_takes_arguments_that_leave_memories_as_they_are(
    url: str, store_of_this_template: Path, tokenizer_folder: Path
) -> None:
    """Thinking on or off changes the end of a prompt only."""
    config = VLLMServerConfig(
        base_url=url,
        model=MODEL,
        api_key_env=KEY_VARIABLE,
        tokenizer_name_or_path=str(tokenizer_folder),
        store_dir=str(store_of_this_template),
    )
    kwargs = {"enable_thinking": False}
    backend = VLLMServerBackend.open(config, "chat", kwargs)
    assert backend.split(TURNS).ids == whole(backend.tokenizer, TURNS, **kwargs) != whole(backend.tokenizer, TURNS)
    with pytest.raises(ConfigError, match=r"change what stands before a memory.*Leave store_dir out"):
        VLLMServerBackend.open(config, "chat", KWARGS)  # its connector compares a file's template with its own
