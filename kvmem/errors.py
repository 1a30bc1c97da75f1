"""The errors of this package. Every message names what is wrong and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import pydantic


class KVMemError(Exception):
    """The base class of every error that this package raises deliberately."""


class KVMemWarning(UserWarning):
    """Something was lost or could not be written, and the work goes on without it."""


class ConfigError(KVMemError, ValueError):
    """A configuration names something unknown, or has a value that is not allowed."""


class ArgumentError(KVMemError, TypeError):
    """An argument has the wrong type."""


class ClosedError(KVMemError):
    """A scheduler was used after `close`."""


class ModelError(KVMemError):
    """A model can't be loaded, or its architecture is not supported."""


class PromptError(KVMemError, ValueError):
    """A text can't become a prompt: it is empty, too long, or the template refuses it."""


class UnknownMemoryError(KVMemError, KeyError):
    """An id is not stored."""

    def __str__(self) -> str:  # KeyError prints its message with quotes
        return str(self.args[0])


class DuplicateMemoryError(KVMemError, ValueError):
    """An id is already stored."""


class NamespaceError(KVMemError, ValueError):
    """An item belongs to another namespace than the memory that should keep, extend or load it."""


class FingerprintError(KVMemError, ValueError):
    """A cache was built by another model, tokenizer or template than the one in use."""


class ModelChangedError(FingerprintError):
    """An open model was changed: its weights or adapters are not those that stored memories were built with."""


class CacheInUseError(KVMemError, RuntimeError):
    """A cache view is already growing by another answer."""


class StoredCacheError(KVMemError, ValueError):
    """A stored cache was changed from outside and does not hold its memory any more."""


class MergeError(KVMemError, ValueError):
    """A merge strategy does not support these items or this model."""


class CompactionError(KVMemError, ValueError):
    """A compaction does not cover this model or item, or an operation does not cover a compacted memory."""


class BudgetError(KVMemError, ValueError):
    """An item does not fit into the free bytes of a tier's budget."""


class CapacityError(KVMemError, ValueError):
    """Memory, query and answer together are longer than the engine's buffer."""


class BuildCancelled(KVMemError):
    """A build was cancelled deliberately: its text changed, or the scheduler is closing."""


class StorageError(KVMemError):
    """A file can't be read or written. What was in memory or in the file before is unchanged."""


class DamagedFileError(StorageError):
    """A file is truncated, altered, or not in the format that its suffix says."""


class ChangedFileError(DamagedFileError):
    """A file was overwritten or cut off after it was loaded, and stored tensors are mapped from it."""


class UnsafeFileError(StorageError):
    """A pickle names something that is not on the allow-list. No code in it was run."""


class EngineError(KVMemError):
    """An inference engine is not installed, is not a supported version or kind, or refused a request."""


class ServerError(EngineError):
    """An inference server is down, too slow, not of the expected kind, or refused a request. The message names it."""


class InjectionError(EngineError):
    """An engine did not reuse a memory: the file is damaged or missing, or the cache hit did not happen."""


def check_kind(what: str, given: object, *kinds: type, way_out: str = "") -> None:
    """Raises ArgumentError unless `given` is an instance of one of `kinds`. `what` starts the message, as a subject.

    >>> check_kind("An id", 3, str, way_out="Give its text.")
    Traceback (most recent call last):
    kvmem.errors.ArgumentError: An id has to be str, not int. Give its text.
    """
    if not isinstance(given, kinds):
        wanted, got = ([kind.__name__.replace("NoneType", "None") for kind in some] for some in (kinds, [type(given)]))
        raise ArgumentError(f"{what} has to be {' or '.join(wanted)}, not {got[0]}. {way_out}".rstrip())


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence with the choice nearest to `name`, then all choices.

    >>> did_you_mean("devise", ["device", "dtype"])
    'Did you mean device? Choices: device, dtype.'
    """
    known = sorted(set(choices))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"Did you mean {near[0]}? " if near else "") + f"Choices: {', '.join(known)}."


def config_error(what: str, error: pydantic.ValidationError, known: Iterable[str]) -> ConfigError:
    """The findings of pydantic as one ConfigError, with the nearest of the `known` names for an unknown key."""
    lines = []
    for finding in error.errors():
        key = ".".join(str(part) for part in finding["loc"])
        if finding["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"{what}: unknown key {key!r}. {did_you_mean(str(finding['loc'][-1]), known)}")
        elif finding["type"] in ("missing", "missing_argument"):
            lines.append(f"{what}: {key!r} is missing.")
        elif finding["type"] == "value_error":  # one of this package's validators, whose message is complete
            lines.append(f"{what}{'.' if key else ''}{key}: {finding['ctx']['error']}")
        else:
            lines.append(f"{what}.{key}: {finding['msg']} (got {finding['input']!r})")
    return ConfigError("\n".join(lines))
