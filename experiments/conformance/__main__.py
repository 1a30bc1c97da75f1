"""python -m experiments.conformance [ARCHITECTURE...]: what kvmem gives on each causal language model of transformers.

Without a name it tries all of them and writes docs/conformance.md. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import transformers

from experiments import signals
from experiments.conformance import page
from experiments.conformance.checks import ESSENTIAL, STEPS, check
from experiments.conformance.recipes import architectures
from kvmem.errors import KVMemError, did_you_mean
from kvmem.models import loading

PAGE = Path(__file__).parents[2] / "docs/conformance.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.conformance",
        description="Tries kvmem on tiny random models of the causal language models that transformers lists. "
        "Without a name it tries all, which takes some minutes, and writes docs/conformance.md.",
    )
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="a model type, such as llama")
    parser.add_argument("--out", type=Path, help=f"the page's path; default: {PAGE.name} in docs/ if all are tried")
    chosen = parser.parse_args(arguments)
    known = architectures()
    for name in chosen.architectures:
        if name not in known:
            print(f"error: {name!r} is no architecture. {did_you_mean(name, known)}", file=sys.stderr)
            return 2
    try:
        with signals.raised():
            return _run(chosen.architectures or known, chosen.out or (None if chosen.architectures else PAGE))
    except signals.Stopped as stopped:
        print(f"Interrupted ({stopped.name}). Nothing was written.", file=sys.stderr)
        return stopped.exit_status
    except (KVMemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(names: Sequence[str], out: Path | None) -> int:
    warnings.simplefilter("ignore")  # of transformers, about kernels that are not installed and odd configs
    transformers.logging.set_verbosity_error()
    tokenizer, started, found = loading.load_tokenizer(loading.PACKAGED), time.perf_counter(), []
    for name in names:
        findings = check(name, tokenizer)
        found.append(findings)
        print("\n".join(page.lines(findings) if out is None else page.lines(findings)[:1]), flush=True)
        if out is not None and page.verdict(findings, ESSENTIAL) == "failed":
            print("\n".join(line for line in page.lines(findings) if ": failed" in line))
    print(f"{page.summary(found, ESSENTIAL)}; {time.perf_counter() - started:.0f} s")
    if out is not None:
        out.write_text(page.markdown(found, ESSENTIAL, STEPS))
    return int(any(page.verdict(findings, ESSENTIAL) == "failed" for findings in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
