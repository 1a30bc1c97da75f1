"""Real documentation: the topics of CPython's own `help()`, and questions about them."""

from __future__ import annotations

import random
import re
from functools import cache
from pydoc_data.topics import topics

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from experiments.workloads.grid import GridWorkload, Question, Texts

QUESTIONS: dict[str, tuple[str, ...]] = {
    "assert": ("What does assert do?", "When does an assert statement raise an error, and when is it skipped?"),
    "assignment": ("What does an assignment do?", "How does Python assign to a list of targets on the left-hand side?"),
    "attribute-access": (
        "When is __getattr__ called?",
        "How can a class take over what happens when an attribute is read?",
    ),
    "booleans": (
        "What does the operator or return?",
        "Which values does Python take to be false in a Boolean operation?",
    ),
    "calls": (
        "What is a keyword argument?",
        "How are the arguments of a call matched with the parameters of a function?",
    ),
    "class": ("What is a class decorator?", "What happens, step by step, when Python runs a class definition?"),
    "comparisons": (
        "Can comparisons be chained?",
        "How does Python compare two lists, and what do is and == differ in?",
    ),
    "context-managers": ("What is a context manager?", "What do the methods __enter__ and __exit__ of an object do?"),
    "dict": ("What is a dictionary display?", "Which value stays when a key stands twice in a dictionary display?"),
    "exceptions": ("What is an exception?", "How does Python find the handler of an exception that was raised?"),
    "for": ("When does the else of a for loop run?", "What happens to the loop variable of a for loop after the loop?"),
    "function": (
        "When are default values evaluated?",
        "What does a decorator do to the function that it stands before?",
    ),
    "global": ("What does global do?", "What is the rule for a name that is used before its global statement?"),
    "import": ("What does import do first?", "Which names does a star import bind, and how can a module limit them?"),
    "lambda": ("What is a lambda?", "What can a lambda expression not contain that a function definition can?"),
    "naming": ("What is a scope?", "How does Python decide which variable a name in a nested function stands for?"),
    "objects": ("What is an object's identity?", "Which of an object's identity, type and value can change, and when?"),
    "raise": (
        "What does raise without an expression do?",
        "What is the purpose of the from clause of a raise statement?",
    ),
    "return": ("Where may return stand?", "What happens when a return statement leaves a try with a finally clause?"),
    "slicings": ("What is a slicing?", "How are the start, stop and step of a slicing passed on to the object?"),
    "try": ("When does finally run?", "In which order do the parts of a try statement run when an exception occurs?"),
    "while": ("When does while stop?", "What does a break or a continue do in the first suite of a while loop?"),
    "with": ("What does with do?", "What happens, step by step, when Python runs a with statement with one item?"),
    "yield": ("What is yield for?", "What becomes of a function whose body has a yield statement in it?"),
}
"""Topics that every supported CPython has, with a short and a long wording of a question about each."""

_UNDERLINE = re.compile(r"^[*=\-~^#]{3,}$", re.MULTILINE)


@cache
def topic_text(topic: str) -> str:
    """The text of a topic, without the lines under its headings."""
    text = _UNDERLINE.sub("", topics[topic])
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def docs_text(first_topic: str, order_seed: str) -> str:
    """The text of `first_topic`, followed by all other topics in a seeded order; about 110,000 tokens."""
    others = sorted(set(topics) - {first_topic})
    random.Random(order_seed).shuffle(others)
    return "\n\n".join(topic_text(topic) for topic in (first_topic, *others))


def docs_texts(seed: int, context: int, memories: int) -> Texts:
    """The texts of the `context`-th context.

    Each memory begins with a different topic, and the question is about one of these. Where all topics are used, they
    are used again, each under a heading of its own. So all memories of all contexts begin differently, and an engine's
    prefix cache can't use one for another.
    """
    order = sorted(QUESTIONS)
    random.Random(seed).shuffle(order)
    numbers = [context * memories + i for i in range(memories)]
    firsts = [order[number % len(order)] for number in numbers]
    heads = [f"Edition {edition}.\n\n" if (edition := number // len(order) + 1) > 1 else "" for number in numbers]
    elsewhere = order[(context * memories + memories) % len(order)]
    topic = random.Random(f"{seed} {context}").choice(firsts)
    return Texts(
        memories=tuple(
            head + docs_text(first, f"{seed} {context} {i}")
            for i, (head, first) in enumerate(zip(heads, firsts, strict=True))
        ),
        passage=docs_text(elsewhere, f"{seed} {context} passage"),
        question_for=lambda _: Question(QUESTIONS[topic]),
    )


@dataclass(config=ConfigDict(extra="forbid"))
class PythonDocs(GridWorkload):
    """The memory is CPython's documentation, the query is a question about one of its topics."""

    def texts(self, context: int) -> Texts:
        return docs_texts(self.seed, context, self.memories)
