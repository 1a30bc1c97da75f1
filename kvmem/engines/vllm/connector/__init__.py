"""The part that runs inside vLLM: a KV connector that saves, injects and pins memories.

`protocol` defines the request parameters and the report, and is all that this package exports: importing it does not
import vLLM. `connector` is the class that vLLM loads; `scheduler_side` and `block_pins` run in vLLM's scheduler, and
`worker_side`, `block_layouts` and `host_cache` run in its workers.
"""

from kvmem.engines.vllm.connector.protocol import (
    CONNECTOR_CLASS,
    CONNECTOR_MODULE,
    FINGERPRINT,
    FOLDER,
    ITEM,
    LOAD,
    PIN,
    REPORT,
    REPORT_TO,
    SAVE,
    UNPIN,
    Report,
    check_version,
    part_name,
    report_name,
)

__all__ = [
    "CONNECTOR_CLASS",
    "CONNECTOR_MODULE",
    "FINGERPRINT",
    "FOLDER",
    "ITEM",
    "LOAD",
    "PIN",
    "REPORT",
    "REPORT_TO",
    "SAVE",
    "UNPIN",
    "Report",
    "check_version",
    "part_name",
    "report_name",
]
