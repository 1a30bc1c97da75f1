"""Names of the arms that more than one module refers to: the injection methods that are timed side by side."""

from __future__ import annotations

DIRECT, DIRECT_EAGER, ALONE = "direct", "direct, eager", "query alone"
IN_PLACE, GRAPH = "in place", "in place + graph"
NATIVE, GENERATE = "native hit", "LLM.generate hit"
