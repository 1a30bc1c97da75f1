"""`python -m experiments.hardware` prints this machine as JSON, with the layouts that it is, or is a node of."""

from __future__ import annotations

from rich import print_json

from experiments.hardware.layout import CARDS, conditions, inspect, read_card


def main() -> None:
    """Prints what a row's conditions say of this machine, its memory in 10⁹ bytes, and its layouts."""
    here = inspect()
    cards = [read_card(path) for path in sorted(CARDS.glob("*.yaml"))]
    layouts = [card.name for card in cards if card.is_met_by(here)]
    print_json(data=conditions() | {"memory_gb": round(here.memory_gb, 1), "layouts": layouts})


if __name__ == "__main__":
    main()
