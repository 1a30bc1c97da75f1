"""Plants every fault, one at a time, and prints a table.

python -m tests.mutations                      every fault
python -m tests.mutations clocks "10% slower"  those whose kind or name has one of these words
python -m tests.mutations hardware=h100        words with "=" are Hydra overrides, for another engine or machine
python -m tests.mutations --honest 20          20 runs without a fault instead: none may be invalid

Exit status 1 if a fault escaped (a row of the mutated arm was `ok`, or the run's exit status would have been 0), or if
an honest run was invalid.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import SMOLLM2, Mutation
from tests.mutations.suite import Outcome, run

HONEST = Mutation("honest", "no fault", "", (), SMOLLM2)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="of a kind or a name; with =: overrides of Hydra")
    parser.add_argument("--honest", type=int, metavar="N", help="N runs without a fault")
    asked = parser.parse_args(arguments)
    overrides = [word for word in asked.words if "=" in word]
    words = [word for word in asked.words if "=" not in word]
    logging.disable(logging.CRITICAL)
    if asked.honest:
        return honest([HONEST] * asked.honest, overrides)
    return planted([one for one in MUTATIONS if not words or any(word in str(one) for word in words)], overrides)


def planted(mutations: Iterable[Mutation], overrides: Sequence[str] = ()) -> int:
    """Runs each of `mutations`, prints what its run said, and a table by kind. Returns the exit status."""
    counts: dict[str, Counter[str]] = {}
    for mutation in mutations:
        outcome, seconds = _timed(mutation, overrides)
        counts.setdefault(mutation.kind, Counter())[outcome.word] += 1
        print(f"{outcome.word:<10} {seconds:3.0f} s  {mutation}\n{'':18}{_reasons(outcome)}", flush=True)
    print(f"\n{'kind':<22}{'planted':>8}{'noticed':>8}{'by chance':>10}{'escaped':>8}")
    for kind, count in counts.items():
        print(f"{kind:<22}{count.total():>8}{count['noticed']:>8}{count['by chance']:>10}{count['ESCAPED']:>8}")
    return int(any(count["ESCAPED"] for count in counts.values()))


def honest(mutations: Iterable[Mutation], overrides: Sequence[str] = ()) -> int:
    """Runs without a fault, prints each verdict, and returns the exit status."""
    counts: Counter[str] = Counter()
    for mutation in mutations:
        outcome, seconds = _timed(mutation, overrides)
        counts[outcome.verdict] += 1
        print(f"{outcome.verdict:<10} {seconds:3.0f} s  {_reasons(outcome)}", flush=True)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(bool(counts["invalid"]))


def _timed(mutation: Mutation, overrides: Sequence[str]) -> tuple[Outcome, float]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        outcome = run(mutation, Path(folder) / "run", overrides)
    return outcome, time.perf_counter() - started


def _reasons(outcome: Outcome) -> str:
    return "; ".join(dict.fromkeys(outcome.reasons)) or "ok"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
