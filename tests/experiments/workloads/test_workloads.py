"""Workloads: exact token counts of a verified split, for any tokenizer and both templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from experiments.workloads.base import Cell, Workload
from experiments.workloads.cut import cut, memory_tokens
from experiments.workloads.dialogue import DEBUGGING, TRIP, Dialogue
from experiments.workloads.faq import TRADES, Faq, company
from experiments.workloads.files import Files
from experiments.workloads.grid import labels
from experiments.workloads.published import Published, published_counts
from experiments.workloads.python_docs import QUESTIONS, PythonDocs, docs_text, topic_text
from kvmem.errors import ConfigError, PromptError
from kvmem.models.loading import PACKAGED_HUB_NAME, packaged_folder
from kvmem.prompt.template import PromptTemplate, TemplateKind

SEPARATOR = "\n\n"
EXAMPLES = Path(__file__).parents[3] / "examples" / "files"

# A template with its own BOS, a header before every turn and an end marker after it.
HEADED_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(packaged_folder() or PACKAGED_HUB_NAME)


def trained_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds BOS before every text.

    A small vocabulary splits most words into several tokens.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|head|>", "<|/head|>", "<|end|>"]
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topic_text(topic) for topic in QUESTIONS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=special[1:3],
        chat_template=HEADED_TEMPLATE,
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "smollm2": smollm2_tokenizer,
    "bpe_4000": lambda: trained_tokenizer(4000),
    "bpe_400": lambda: trained_tokenizer(400),
}
TEMPLATES = [(name, kind) for name in TOKENIZERS for kind in ("chat", "plain")]


@pytest.fixture(scope="session", params=TEMPLATES, ids="-".join)
def template(request: pytest.FixtureRequest, tokenizers: dict[str, PreTrainedTokenizerBase]) -> PromptTemplate:
    name, kind = request.param
    return PromptTemplate(tokenizers[name], kind)


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {name: load() for name, load in TOKENIZERS.items()}


@pytest.fixture(scope="session")
def chat(tokenizers: dict[str, PreTrainedTokenizerBase]) -> PromptTemplate:
    return PromptTemplate(tokenizers["smollm2"], "chat")


def split_counts(template: PromptTemplate, cell: Cell) -> tuple[int, int]:
    """The lengths of the cell's two parts, tokenised again from its texts."""
    prompt = template.split(memory_tokens(template, cell.memories, SEPARATOR), cell.question)
    return len(prompt.memory_ids), len(prompt.query_ids)


def assert_exact(template: PromptTemplate, cells: list[Cell], wanted: list[tuple[int, int]]) -> None:
    assert [(cell.context_tokens, cell.query_tokens) for cell in cells] == wanted
    assert [split_counts(template, cell) for cell in cells] == wanted


def pairs(contexts: list[int], queries: list[int]) -> list[tuple[int, int]]:
    return [(context, query) for context in contexts for query in queries]


@pytest.mark.parametrize("memories", [1, 3])
@pytest.mark.parametrize("kind", [PythonDocs, Faq])
def test_counts_are_exact(template: PromptTemplate, kind: type[PythonDocs] | type[Faq], memories: int) -> None:
    contexts, queries = [701, 1024], [83, 200]
    cells = list(kind(context_tokens=contexts, query_tokens=queries, memories=memories).cells(template, SEPARATOR))
    assert_exact(template, cells, pairs(contexts, queries))
    assert all(len(cell.memories) == memories for cell in cells)


@pytest.mark.parametrize("kind", ["chat", "plain"])
@pytest.mark.parametrize("memories", [1, 4])
def test_default_lengths_on_the_packaged_tokenizer(
    tokenizers: dict[str, PreTrainedTokenizerBase], kind: TemplateKind, memories: int
) -> None:
    template = PromptTemplate(tokenizers["smollm2"], kind)
    for workload in (PythonDocs(memories=memories), Faq(memories=memories)):
        cells = list(workload.cells(template, SEPARATOR))
        assert_exact(template, cells, pairs([256, 512, 1024], [32, 64, 128]))


def test_published_counts_in_the_order_of_the_table(chat: PromptTemplate) -> None:
    assert published_counts() == ([6064, 2773, 583], [953, 303, 167])
    cells = list(Published().cells(chat, SEPARATOR))
    assert_exact(chat, cells, pairs([6064, 2773, 583], [953, 303, 167]))
    assert [(cell.context, cell.query) for cell in cells[2:5]] == [
        ("long", "short"),
        ("medium", "long"),
        ("medium", "medium"),
    ]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.integers(1, 400), query=st.integers(1, 200), seed=st.integers(0, 5))
def test_every_target_is_met_or_refused_with_its_counts(
    template: PromptTemplate, context: int, query: int, seed: int
) -> None:
    workload = PythonDocs(context_tokens=[context], query_tokens=[query], seed=seed)
    try:
        cells = list(workload.cells(template, SEPARATOR))
    except PromptError as error:
        # No tokenizer here needs more than this for the shortest memory or question.
        too_short = "query" if f"query_tokens={query}" in str(error) else "context"
        assert (query if too_short == "query" else context) < 100
        assert f"{too_short}_tokens={query if too_short == 'query' else context}" in str(error)
    else:
        assert_exact(template, cells, [(context, query)])


@settings(max_examples=60, deadline=None)
@given(target=st.integers(3, 300))
def test_cut_keeps_the_head_of_the_text(target: int) -> None:
    text = docs_text("for", "0")
    head = cut(text, target, lambda candidate: len(candidate.split()), "words")
    assert len(head.split()) == target and text.startswith(
        head
    )  # the count is the number of words, so no filler is needed


def test_an_unreachable_target_raises_an_error_with_the_counts(chat: PromptTemplate) -> None:
    with pytest.raises(PromptError, match=r"workload\.context_tokens=2.*already take \d+\. Choose \d+ or more"):
        PythonDocs(context_tokens=[2]).cells(chat, SEPARATOR)
    with pytest.raises(PromptError, match=r"workload\.query_tokens=4.*already take \d+\. Choose \d+ or more"):
        PythonDocs(query_tokens=[4]).cells(chat, SEPARATOR)
    with pytest.raises(PromptError, match=r"500 tokens can't be reached, because the whole text has 5"):
        cut("five words and no more", 500, lambda text: len(text.split()), "words")


def test_the_seed_determines_the_text(chat: PromptTemplate) -> None:
    for kind in (PythonDocs, Faq):
        first, again, other = (kind(seed=seed, max_cells=1).cells(chat, SEPARATOR) for seed in (1, 1, 2))
        assert first == again
        assert first[0].memories != other[0].memories


def test_contexts_share_no_prefix(chat: PromptTemplate) -> None:
    """A prefix cache must not serve one context from another."""
    for workload in (PythonDocs(query_tokens=[48]), Faq(query_tokens=[48])):
        heads = [cell.memories[0][:80] for cell in workload.cells(chat, SEPARATOR)]
        assert len(set(heads)) == 3


def test_cells_of_one_context_share_their_memories(chat: PromptTemplate) -> None:
    cells = PythonDocs(max_cells=3).cells(chat, SEPARATOR)
    assert len({cell.memories for cell in cells}) == 1
    assert [cell.query for cell in cells] == ["short", "medium", "long"]


def test_labels_are_names_for_three_lengths_and_counts_otherwise() -> None:
    assert labels([1024, 256, 512]) == {256: "short", 512: "medium", 1024: "long"}
    assert labels([64]) == {64: "64"}
    assert labels([1, 2, 3, 4]) == {1: "1", 2: "2", 3: "3", 4: "4"}


@pytest.mark.parametrize("workload", [PythonDocs(max_cells=2), Faq(max_cells=2), Published(max_cells=2)])
def test_max_cells_keeps_the_first_cells(chat: PromptTemplate, workload: Workload) -> None:
    assert len(workload.cells(chat, SEPARATOR)) == 2


def test_every_topic_with_questions_exists() -> None:
    for topic, questions in QUESTIONS.items():
        assert len(topic_text(topic)) > 200 and "****" not in topic_text(topic)
        assert all(question.endswith("?") for question in questions)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("memories", [1, 4])
def test_faq_asks_for_a_fact_that_its_memories_hold(chat: PromptTemplate, seed: int, memories: int) -> None:
    for cell in Faq(context_tokens=[400], query_tokens=[40, 90], memories=memories, seed=seed).cells(chat, SEPARATOR):
        assert cell.truth is not None
        entries = [entry for memory in cell.memories for entry in str(memory).split("\n\n") if entry.startswith("Q: ")]
        answering = [
            entry for entry in entries if entry.removeprefix("Q: ").split("\n")[0] in cell.question and "?\n" in entry
        ]
        assert len(answering) == 1 and cell.truth in answering[0]


@pytest.mark.parametrize("trade", TRADES)
def test_faq_states_each_fact_once(trade: str) -> None:
    _, entries = company("0", trade)
    assert len({entry.question for entry in entries}) == len(entries) > 500
    assert all(entry.truth in entry.answer for entry in entries)


def test_faq_too_short_for_an_entry_is_refused(chat: PromptTemplate) -> None:
    with pytest.raises(PromptError, match="no complete FAQ entry"):
        Faq(context_tokens=[40]).cells(chat, SEPARATOR)


@pytest.mark.parametrize("topic", ["trip", "debugging"])
@pytest.mark.parametrize("system", [None, "You are a patient helper."])
def test_dialogue_extends_turn_by_turn(chat: PromptTemplate, topic: str, system: str | None) -> None:
    cells = list(Dialogue(topic=topic, turns=9, system=system).cells(chat, SEPARATOR))  # type: ignore[arg-type]
    assert len(cells) == 9
    assert all(split_counts(chat, cell) == (cell.context_tokens, cell.query_tokens) for cell in cells)
    for before, after in pairwise(cells):
        earlier, later = before.memories[0], after.memories[0]
        assert later[: len(earlier)] == earlier
        assert later[len(earlier)] == {"role": "user", "content": before.question}
        assert after.context_tokens > before.context_tokens
    assert (cells[0].memories[0][0] == {"role": "system", "content": system}) is (system is not None)


def test_a_dialogue_needs_a_template_with_turns(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    assert len(TRIP) == len(DEBUGGING) == 10
    with pytest.raises(ValidationError, match=r"turns=10: .* has 9"):
        Dialogue(turns=10)
    with pytest.raises(PromptError, match="template=chat"):
        Dialogue().cells(PromptTemplate(tokenizers["smollm2"], "plain"), SEPARATOR)


def test_files_from_the_examples(template: PromptTemplate) -> None:
    workload = Files(memory=[str(EXAMPLES / "memory.md")], questions=[str(EXAMPLES / "questions.txt")])
    cells = list(workload.cells(template, SEPARATOR))
    assert [cell.query for cell in cells] == [f"questions:{i}" for i in range(1, 6)]
    assert all(split_counts(template, cell) == (cell.context_tokens, cell.query_tokens) for cell in cells)


def test_files_joins_memories_and_reads_truth(chat: PromptTemplate, tmp_path: Path) -> None:
    memories, questions = tmp_path / "notes.jsonl", tmp_path / "ask.jsonl"
    texts = [f"Drawer number {i} holds {i + 3} spoons and nothing else at all." for i in range(3)]
    memories.write_text("\n".join(json.dumps({"memory": text}) for text in texts) + "\n\n")
    questions.write_text(json.dumps({"question": "How many spoons are in drawer 1?", "truth": 4}))
    cells = list(Files(memory=[str(memories)], questions=[str(questions)], memories=2).cells(chat, SEPARATOR))
    assert [cell.memories for cell in cells] == [(texts[0], texts[1]), (texts[2],)]
    assert [(cell.context, cell.query, cell.truth) for cell in cells] == [
        ("notes:1+notes:2", "ask:1", "4"),
        ("notes:3", "ask:1", "4"),
    ]
    assert all(split_counts(chat, cell) == (cell.context_tokens, cell.query_tokens) for cell in cells)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.md", None, r"workload\.memory: there is no file .*gone\.md"),
        ("empty.txt", b" \n", r"empty\.txt is empty"),
        ("table.csv", b"a,b", r"table\.csv .* Choices: \.txt, \.md, \.jsonl"),
        ("latin.txt", b"K\xe4se", r"latin\.txt is not UTF-8"),
        ("a.jsonl", b'{"memory": "x"}\n{"memory": \n', r"a\.jsonl, line 2 is not JSON"),
        ("b.jsonl", b'{"memory": "x"}\n\n{"text": "y"}\n', r"b\.jsonl, line 3 has no text under 'memory'"),
        ("c.jsonl", b'["x"]\n', r"c\.jsonl, line 1 has no text under 'memory'"),
        ("d.jsonl", b'{"memory": " "}\n', r"d\.jsonl, line 1 has no text under 'memory'"),
    ],
)
def test_an_unreadable_file_is_named_in_the_error(
    chat: PromptTemplate, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Files(memory=[str(tmp_path / name)], questions=[str(EXAMPLES / "questions.txt")]).cells(chat, SEPARATOR)


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        (PythonDocs, {"context_tokens": []}),
        (PythonDocs, {"query_tokens": [0]}),
        (Faq, {"memories": 0}),
        (Published, {"context_tokens": [5]}),
        (Dialogue, {"topic": "weather"}),
        (Files, {"questions": []}),
    ],
)
def test_knobs_are_checked_before_anything_loads(kind: type[Workload], knobs: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        kind(**knobs)
