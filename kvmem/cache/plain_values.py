"""What a file keeps exactly: text of Unicode characters, and values that JSON gives back as they were."""

from __future__ import annotations

import math

MAX_DEPTH = 100
"""Lists and dictionaries nest at most so deep. Readers of JSON refuse more (pydantic at about 200 levels)."""
MAX_INT_BITS = 10_000
"""Integers have at most so many bits. Python refuses to read one of more than 4300 digits."""


def text_fault(text: str) -> str:
    r"""Why a file can't keep `text`, as the end of a sentence; "" if it can.

    >>> text_fault("caf\u00e9"), text_fault("a\ud800")
    ('', 'has a lone surrogate, U+D800 at character 1, which is no character of Unicode')
    """
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        return (
            f"has a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start}, "
            "which is no character of Unicode"
        )
    return ""


def value_fault(value: object, where: str = "", depth: int = 0) -> str:
    """Why a JSON file would not give `value` back as it is, as the end of a sentence; "" if it would.

    Types are compared exactly: a tuple comes back as a list, an enum as its value, NaN as null. `where` is the path
    from the value that was first given.

    >>> value_fault({"page": 7, "tags": ["a", None]}), value_fault({"tags": [("a", "b")]})
    ('', "['tags'][0] is a tuple")
    """
    if depth > MAX_DEPTH:
        return f"{where[:40]}… nests more than {MAX_DEPTH} levels deep"
    if type(value) is dict:
        for key, entry in value.items():
            if type(key) is not str:
                return f"{where} has the key {key!r}, which is no str"
            fault = text_fault(key)
            if fault:
                return f"{where} has the key {key!r}, which {fault}"
            fault = value_fault(entry, f"{where}[{key!r}]", depth + 1)
            if fault:
                return fault
        return ""
    if type(value) is list:
        return next(
            (fault for i, entry in enumerate(value) if (fault := value_fault(entry, f"{where}[{i}]", depth + 1))), ""
        )
    if type(value) is str:
        fault = text_fault(value)
        return f"{where} {fault}" if fault else ""
    if type(value) is float:
        return "" if math.isfinite(value) else f"{where} is {value}"
    if type(value) is int:
        return "" if value.bit_length() <= MAX_INT_BITS else f"{where} is an integer of {value.bit_length()} bits"
    return "" if value is None or type(value) is bool else f"{where} is a {type(value).__name__}"
