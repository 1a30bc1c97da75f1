"""The names of the arms whose rows other modules look for: the ways to inject a memory that are timed side by side."""

from __future__ import annotations

DIRECT, DIRECT_EAGER, ALONE = "direct", "direct, eager", "query alone"
IN_PLACE, GRAPH = "in place", "in place + graph"

INJECTION_COST = "injection_cost"
"""The scenario whose rows name one of these arms each."""
