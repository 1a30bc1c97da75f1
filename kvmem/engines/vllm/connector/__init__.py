"""The part that runs inside vLLM: a KV connector that saves, injects and pins memories.

`protocol` names the request parameters and is imported on both sides. The other modules import vLLM.
"""

from kvmem.engines.vllm.connector.connector import check_version
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
    "check_version",
    "part_name",
    "report_name",
]
