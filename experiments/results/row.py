"""One row: what was measured, on what and under which conditions, the verdict on it, and its scenario's payload."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cache
from types import NoneType
from typing import Any, ClassVar, NamedTuple

from pydantic import TypeAdapter, ValidationError

from experiments.results import version1
from kvmem.errors import ConfigError, config_error
from kvmem.registry import Registry

VERSION = 2
"""Of the lines of rows.jsonl. Version 1 had no version field, and the figures of every scenario in the row itself."""


class TimedPrefill(NamedTuple):
    """One measured prefill: `new_tokens` computed behind `cached_tokens`, `moved_bytes` of KV fetched from the host."""

    arm: str
    new_tokens: int
    cached_tokens: int
    moved_bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Payload:
    """The figures of one scenario. A scenario declares a subclass in its own file, one for each kind of row.

    Fields carry their unit in the name (`_s`, `_bytes`, `_pct`, `_tokens`); None means not measured.
    """

    name: ClassVar[str]
    """The `scenario` of the rows that hold it, and the title of their table."""
    columns: ClassVar[tuple[str, ...]] = ()
    """The columns of their table: fields or properties of the payload, or fields of the row. () is every field of the
    payload that holds a number or a text."""

    @property
    def may_diverge(self) -> bool:
        """Whether a diverging answer is the known price of what was measured, such as a quantized tier."""
        return False

    @property
    def is_measured(self) -> bool:
        """False for the row of an arm that this machine can't measure; its `verdict_reason` tells why."""
        return True

    def prefills(self, row: Row) -> list[TimedPrefill]:
        """The prefill times among the figures, for fitting a performance model. `row` is the row that holds this."""
        return []

    def figures(self) -> dict[str, Any]:
        """Every field that holds a number or a text, None included, in order of declaration."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, (int, float, str, NoneType))}


PAYLOADS = Registry(Payload, "experiments.scenarios", "scenario")
"""The payloads of all scenarios, by name."""


@cache
def _reader(name: str) -> tuple[TypeAdapter[Payload], frozenset[str]]:
    """Validates the payload of a scenario's row; and the names of its fields."""
    payload = PAYLOADS.find(name)
    return TypeAdapter(payload), frozenset(field.name for field in dataclasses.fields(payload))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of one scenario. Times are in seconds, sizes in bytes, lengths in tokens; None means not measured."""

    # What was measured.
    model: str
    weights: str
    dtype: str
    backend: str
    attention: str
    hardware: str
    scenario: str
    merge: str
    tier: str
    arm: str
    context_tokens: int
    query_tokens: int
    context_label: str = ""
    """The cell's name in a published table, such as "long"; "" if it has none but its token count."""
    query_label: str = ""
    memories: int = 1
    pairs: int = 0
    """Interleaved rounds; a figure is their median."""

    conditions: dict[str, Any] = field(default_factory=dict)
    """Versions, commit, kernel, graph mode, calibrated rates, clocks and temperature."""

    # What came of it.
    status: str = "done"
    """done or failed."""
    error: str = ""
    """The traceback of a failed cell."""
    verdict: str | None = None
    """ok, invalid or undecided."""
    verdict_reason: str = ""
    rules: int = 0
    """Version of the rules that gave the verdict; 0: those before `experiments/measurement/verdict.py` had versions."""
    equality: str | None = None
    """Grade of the answer against the direct arm's: bitwise, tokens, near_tie, drifted or diverged."""
    first_difference: int | None = None
    """Index of the first greedy token that differs."""
    logit_max_abs_diff: float | None = None
    near_tie_margin: float | None = None
    """Difference of the two logits where a near tie flipped."""

    payload: Payload | None = None
    """The scenario's figures; None in a failed row."""

    def to_json(self) -> str:
        """One line of rows.jsonl. Raises ValueError if a figure is not a number (NaN or infinity)."""
        return json.dumps({"version": VERSION} | dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Reads a line of this version, or of version 1.

        Raises ValueError if the line is not JSON, and ConfigError if its fields are not those of a row.
        """
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ConfigError("it is not a JSON object")
        if "version" not in fields:
            fields = version1.upgraded(fields, frozenset(own.name for own in dataclasses.fields(cls)))
        elif fields["version"] != VERSION:
            raise ConfigError(f"it has version {fields['version']}, and this reader knows version {VERSION}")
        fields.pop("version", None)
        payload = fields.pop("payload", None)
        if unknown := fields.keys() - {own.name for own in dataclasses.fields(cls)}:
            raise ConfigError(f"a row has no field {', '.join(sorted(unknown))}")
        try:
            return cls(**fields, payload=None if payload is None else _payload(fields["scenario"], payload))
        except (TypeError, KeyError) as error:
            raise ConfigError(f"a field is missing: {error}") from error


def _payload(scenario: str, figures: dict[str, Any]) -> Payload:
    adapter, known = _reader(scenario)
    if unknown := figures.keys() - known:
        raise ConfigError(f"scenario={scenario} has no figure {', '.join(sorted(unknown))}")
    try:
        return adapter.validate_python(figures)
    except ValidationError as error:
        raise config_error(f"payload of {scenario}", error, known) from error
