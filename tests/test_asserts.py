"""An assert has no side effect, because `python -O` removes it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for top in ("kvmem", "experiments") for path in (ROOT / top).rglob("*.py"))
PURE = {"isinstance", "len", "all", "any", "startswith"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_asserts_have_no_side_effect(path: Path) -> None:
    calls = [
        (call.lineno, ast.unparse(call.func))
        for statement in ast.walk(ast.parse(path.read_text()))
        if isinstance(statement, ast.Assert)
        for call in ast.walk(statement.test)
        if isinstance(call, ast.Call)
    ]
    assert not [(line, name) for line, name in calls if name.rpartition(".")[2] not in PURE]
