"""Which architectures are exact, by running them: tiny models of all families that transformers lists, and checks.

`python -m experiments.conformance` writes the table that is docs/conformance.md. `recipes` makes a tiny model of a
family, `checks` runs kvmem on it, and `page` makes the table.
"""

from experiments.conformance.checks import ESSENTIAL, Cell, Findings, check, checks
from experiments.conformance.page import markdown, verdict
from experiments.conformance.recipes import architectures, tiny_config, tiny_model

__all__ = [
    "ESSENTIAL",
    "Cell",
    "Findings",
    "architectures",
    "check",
    "checks",
    "markdown",
    "tiny_config",
    "tiny_model",
    "verdict",
]
