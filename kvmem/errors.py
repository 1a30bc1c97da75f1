"""What can go wrong, by name. Every message names the thing and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import pydantic


class KVMemError(Exception):
    """The base of every error that this package raises on purpose."""


class ConfigError(KVMemError, ValueError):
    """A configuration names something that does not exist, or gives a value that is not allowed."""


class ArgumentError(KVMemError, TypeError):
    """A call was given a thing of another kind than it takes."""


class ClosedError(KVMemError):
    """A scheduler was asked for something after its `close`."""


class ModelError(KVMemError):
    """A model can't be had, or its architecture is one that a cache can't be lent to."""


class PromptError(KVMemError, ValueError):
    """A text can't be rendered or tokenised into a prompt: empty, too long, or refused by the template."""


class UnknownMemoryError(KVMemError, KeyError):
    """An id is not in the memory."""

    def __str__(self) -> str:  # KeyError would print the message quoted
        return str(self.args[0])


class DuplicateMemoryError(KVMemError, ValueError):
    """An id is already in the memory."""


class FingerprintError(KVMemError, ValueError):
    """A cache was built by another model, tokenizer or template than the one in hand."""


class MergeError(KVMemError, ValueError):
    """A merge strategy does not cover these items or this model."""


class BudgetError(KVMemError, ValueError):
    """An item does not fit what is left of a tier's budget."""


class CapacityError(KVMemError, ValueError):
    """A memory, query and answer together are longer than the engine's buffer."""


class BuildCancelled(KVMemError):
    """A build was called off on purpose: its text changed, or the scheduler is closing."""


class StorageError(KVMemError):
    """A file can't be read or written; the memory in place is as it was."""


class DamagedFileError(StorageError):
    """A file is truncated, altered, or not of the format that its suffix says."""


class UnsafeFileError(StorageError):
    """A pickle names something that the allow-list does not hold; nothing of it was run."""


class EngineError(KVMemError):
    """An inference engine is not installed, is of a version or kind that is not covered, or refused a request."""


class ServerError(EngineError):
    """An inference server is down, slow, of another kind than expected, or refused a request; the message names it."""


class InjectionError(EngineError):
    """An engine did not reuse the memory that it was given: its file was damaged or gone, or the hit did not happen."""


def check_kind(what: str, given: object, *kinds: type, way_out: str = "") -> None:
    """Raises ArgumentError unless `given` is of one of `kinds`.

    >>> check_kind("An id", 3, str, way_out="Give its text.")
    Traceback (most recent call last):
    kvmem.errors.ArgumentError: An id has to be str, not int. Give its text.
    """
    if not isinstance(given, kinds):
        wanted, got = ([kind.__name__.replace("NoneType", "None") for kind in some] for some in (kinds, [type(given)]))
        raise ArgumentError(f"{what} has to be {' or '.join(wanted)}, not {got[0]}. {way_out}".rstrip())


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence that names the nearest choice and then all of them.

    >>> did_you_mean("devise", ["device", "dtype"])
    'Did you mean device? Choices: device, dtype.'
    """
    known = sorted(set(choices))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"Did you mean {near[0]}? " if near else "") + f"Choices: {', '.join(known)}."


def config_error(what: str, error: pydantic.ValidationError, known: Iterable[str]) -> ConfigError:
    """pydantic's findings as one error of ours, with the nearest known name for a key that does not exist."""
    lines = []
    for finding in error.errors():
        key = ".".join(str(part) for part in finding["loc"])
        if finding["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"{what}: unknown key {key!r}. {did_you_mean(str(finding['loc'][-1]), known)}")
        elif finding["type"] in ("missing", "missing_argument"):
            lines.append(f"{what}: {key!r} is missing.")
        elif finding["type"] == "value_error":  # raised by a check of ours, whose sentence says it all
            lines.append(f"{what}{'.' if key else ''}{key}: {finding['ctx']['error']}")
        else:
            lines.append(f"{what}.{key}: {finding['msg']} (got {finding['input']!r})")
    return ConfigError("\n".join(lines))
