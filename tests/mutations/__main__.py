"""Plants every fault, one at a time, and prints a table: `python -m tests.mutations [words of a kind or a name]`.

Exit status 1 if a fault escaped: a row of the mutated arm was `ok`, or the run's exit status would have been 0.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.suite import run


def main(words: list[str]) -> int:
    logging.disable(logging.CRITICAL)
    chosen = [one for one in MUTATIONS if not words or any(word in f"{one.kind}: {one.name}" for word in words)]
    counts: dict[str, Counter[str]] = {}
    for mutation in chosen:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            outcome = run(mutation, Path(folder) / "run")
        counts.setdefault(mutation.kind, Counter())[outcome.word] += 1
        seconds = time.perf_counter() - started
        reasons = "; ".join(outcome.reasons) or "ok"
        print(f"{outcome.word:<10} {seconds:3.0f} s  {mutation.kind}: {mutation.name}\n{'':18}{reasons}", flush=True)
    print(f"\n{'kind':<22}{'planted':>8}{'noticed':>8}{'by chance':>10}{'escaped':>8}")
    for kind, count in counts.items():
        print(f"{kind:<22}{count.total():>8}{count['noticed']:>8}{count['by chance']:>10}{count['ESCAPED']:>8}")
    return int(any(count["ESCAPED"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
