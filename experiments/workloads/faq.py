"""A seeded generator of plausible FAQ text about a company's products. It knows the fact that answers each question."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from experiments.workloads.grid import GridWorkload, Question, Texts
from kvmem.errors import PromptError

# fmt: off
COMPANIES = (
    "Alder", "Birchwood", "Corvane", "Dunmore", "Elmstead", "Fennick", "Garrow", "Hollin", "Ivybridge", "Juniper",
)
STYLES = (
    "Amber", "Basalt", "Cedar", "Delta", "Ember", "Fjord", "Granite", "Harbour", "Indigo", "Jasmine", "Kestrel",
    "Lagoon", "Meadow", "Nimbus", "Orchid", "Prairie", "Quartz", "Raven", "Saffron", "Tundra", "Umber", "Velvet",
    "Willow", "Zephyr",
)
PEOPLE = (
    "Mara Lindqvist", "Tomas Okafor", "Irene Castell", "Jonas Feld", "Priya Raman", "Lucia Moreau", "Henrik Dahl",
    "Amina Diallo", "Oscar Whitlow", "Nadia Petrov", "Colin Marsh", "Yuki Tanabe", "Sofia Brandt", "Elias Novak",
)
CITIES = (
    "Leeds", "Utrecht", "Bergen", "Porto", "Lyon", "Graz", "Tampere", "Ghent", "Aarhus", "Brno", "Trieste", "Cork",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)
# fmt: on


class Fact(NamedTuple):
    """One kind of fact: its question, its answer, and the kind of its value (a case of `draw`)."""

    question: str
    answer: str
    values: str


class Trade(NamedTuple):
    """A line of business: its name, its products, and the facts about each product."""

    line: str
    goods: tuple[str, ...]
    facts: tuple[Fact, ...]


SHARED = (
    Fact("When was the {name} introduced?", "The {name} was introduced on {value}, and improved since.", "date"),
    Fact(
        "Who looks after questions about the {name}?", "Please write to {value}, who knows the {name} best.", "person"
    ),
)
TRADES = {
    "shop": Trade(
        "Home Store",
        ("desk lamp", "armchair", "bookshelf", "kettle", "rug", "wall clock", "toolbox"),
        (
            Fact("How much does the {name} cost?", "The {name} costs {value}, with tax but without delivery.", "price"),
            Fact(
                "How long is the warranty on the {name}?",
                "The {name} has a warranty of {value} from delivery.",
                "months",
            ),
            Fact("How heavy is the {name}?", "The {name} weighs {value}. One person can carry it.", "weight"),
            Fact(
                "How fast is the {name} delivered?", "Each {name} leaves our depot within {value} of the order.", "days"
            ),
            Fact(
                "Where is the {name} made?", "Each {name} is made in our workshop in {value}, and tested there.", "city"
            ),
        ),
    ),
    "bank": Trade(
        "Savings Bank",
        ("current account", "savings account", "credit card", "car loan", "student account"),
        (
            Fact(
                "What interest does the {name} carry?",
                "The {name} carries {value} a year, reckoned by the day.",
                "rate",
            ),
            Fact(
                "What is the monthly fee of the {name}?",
                "The {name} costs {value} a month; students pay half.",
                "price",
            ),
            Fact("How much notice does the {name} need?", "The {name} can be closed with a notice of {value}.", "days"),
            Fact("Which branch handles the {name}?", "Papers for the {name} go to our branch in {value}.", "city"),
            Fact(
                "How long does the {name} run?", "The first term of the {name} is {value}; it renews itself.", "months"
            ),
        ),
    ),
    "software": Trade(
        "Software",
        ("planner", "ledger", "mail gateway", "photo archive", "build server", "help desk"),
        (
            Fact("What does a seat of the {name} cost?", "A seat of the {name} costs {value} a month.", "price"),
            Fact(
                "How many requests does the {name} allow?", "The {name} allows {value} a minute for a key.", "requests"
            ),
            Fact("How long does the {name} keep deleted data?", "The {name} keeps deleted data for {value}.", "days"),
            Fact("Where are the servers of the {name}?", "The {name} runs in our data centre in {value}.", "city"),
            Fact(
                "How long is a release of the {name} supported?", "A {name} release is supported for {value}.", "months"
            ),
        ),
    ),
}


class Entry(NamedTuple):
    """One entry of an FAQ. `answer` contains `truth` word for word."""

    question: str
    answer: str
    truth: str

    @property
    def text(self) -> str:
        return f"Q: {self.question}\nA: {self.answer}"


def draw(values: str, rng: random.Random) -> str:
    """Draws a plausible value of one kind, such as a price, a term, a weight, a date or a person."""
    match values:
        case "price":
            return f"{rng.randint(4, 480)}.{rng.choice(('00', '25', '50', '90'))} euros"
        case "months":
            return f"{rng.randint(6, 72)} months"
        case "days":
            return f"{rng.randint(2, 95)} days"
        case "weight":
            return f"{rng.randint(1, 40)}.{rng.randint(1, 9)} kilograms"
        case "rate":
            return f"{rng.randint(0, 8)}.{rng.randint(10, 99)} percent"
        case "requests":
            return f"{rng.randint(3, 90) * 20} requests"
        case "date":
            return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1998, 2024)}"
        case "person":
            return rng.choice(PEOPLE)
        case "city":
            return rng.choice(CITIES)
    raise ValueError(values)


def company(seed: str, trade: str) -> tuple[str, list[Entry]]:
    """A company's name and all its FAQ entries, about 40,000 tokens. No two entries are about the same fact."""
    rng = random.Random(seed)
    line, goods, facts = TRADES[trade]
    entries = []
    for style, good, fact in product(STYLES, goods, (*facts, *SHARED)):
        name, value = f"{style} {good}", draw(fact.values, rng)
        entries.append(Entry(fact.question.format(name=name), fact.answer.format(name=name, value=value), value))
    rng.shuffle(entries)
    return f"{rng.choice(COMPANIES)} {line}", entries


def faq_text(name: str, entries: Sequence[Entry], part: int) -> str:
    return "\n\n".join((f"{name}: frequently asked questions, part {part}", *(entry.text for entry in entries)))


def faq_texts(seed: int, context: int, memories: int) -> Texts:
    """The FAQ of the `context`-th company, divided into `memories` parts.

    The question is one of the entries that are still complete after the parts are cut. Long questions quote the FAQ of
    a company in another trade, which does not have the same products.
    """
    trade, other_trade = random.Random(f"{seed} {context} trades").sample(sorted(TRADES), 2)
    name, entries = company(f"{seed} {context}", trade)
    other_name, other_entries = company(f"{seed} {context} other", other_trade)
    parts = [entries[i::memories] for i in range(memories)]

    def question_for(cut: Sequence[str]) -> Question:
        whole = [entry for text, part in zip(cut, parts, strict=True) for entry in _whole(text, part)]
        if not whole:
            raise PromptError(
                "workload.context_tokens is too small: the cut memories hold no complete FAQ entry to ask about. "
                "Choose 100 tokens a memory or more."
            )
        entry = random.Random(f"{seed} {context} asked").choice(whole)
        return Question((entry.question,), entry.truth)

    return Texts(
        memories=tuple(faq_text(name, part, i + 1) for i, part in enumerate(parts)),
        passage=faq_text(other_name, other_entries, 1),
        question_for=question_for,
    )


def _whole(text: str, entries: Sequence[Entry]) -> Iterator[Entry]:
    """The leading entries that `text` holds completely."""
    for entry in entries:
        if f"{entry.text}\n" not in text:  # the last entry may be cut, or end with a filler word
            return
        yield entry


@dataclass(config=ConfigDict(extra="forbid"))
class Faq(GridWorkload):
    """The memory is the FAQ of an invented company, the query is one of its questions.

    `truth` is the fact that answers it.
    """

    def texts(self, context: int) -> Texts:
        return faq_texts(self.seed, context, self.memories)
