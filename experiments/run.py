"""`python -m experiments.run`: the command line (experiments/execution/command.py). A signal ends it with one line."""

from __future__ import annotations

import sys

from experiments import signals


def main() -> int:
    """Returns the exit status: 0, 1 for rows that can't be trusted, 2 for a wrong command, 128 + a signal's number."""
    try:
        with signals.raised():
            from experiments.execution import command  # takes seconds, in which Ctrl-C may come too

            return command.main(sys.argv[1:])
    except signals.Stopped as stopped:
        print(f"Interrupted ({stopped.name}) before anything was measured.", file=sys.stderr)
        return stopped.exit_status


if __name__ == "__main__":
    sys.exit(main())
