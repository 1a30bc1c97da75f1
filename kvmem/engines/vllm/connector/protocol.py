"""Our side of vLLM's KV connector: saves a memory's keys and values to one of our files, and injects one from there.

Importing this package does not import vLLM; `connector` does, and vLLM loads that by its module path. A request asks
through `SamplingParams(extra_args={"kv_transfer_params": {…}})` with the keys below, and the answer's own
`kv_transfer_params` carry a report of what was really reused. Files are named, not pathed: they lie in one folder.
"""

CONNECTOR_MODULE = "kvmem.engines.vllm.connector.connector"
CONNECTOR_CLASS = "KVMemConnector"

LOAD = "kvmem_load"
"""Name of the file to inject: as many leading tokens as file and prompt have in common, all but the prompt's last."""
SAVE = "kvmem_save"
"""Name of the file to write: the whole prompt's keys and values."""
ITEM = "kvmem_item"
"""What the saved file says of itself: an ItemManifest as JSON."""
PIN = "kvmem_pin"
"""A name: once the request is through, the whole blocks of its prompt stay in the engine's prefix cache, whatever
traffic evicts others, until a request unpins that name."""
UNPIN = "kvmem_unpin"
"""A list of names, let go before the request gets its blocks. A name that is not pinned is passed over."""
REPORT_TO = "kvmem_report_to"
"""A name: the report is also written to the folder as `report_name` of it, for an answer that can't carry it (vLLM's
server streams completions without their kv_transfer_params). The one who asked takes the file away."""
REPORT = "kvmem"
"""In the answer: local_tokens, injected_tokens, load_error, save_error, pinned_tokens, pin_error, preemptions."""

FOLDER = "kvmem_folder"
FINGERPRINT = "kvmem_fingerprint"
HOST_BYTES = "kvmem_host_bytes"
"""Keys of `kv_connector_extra_config`: the folder, the model's fingerprint as JSON, how much opened KV to keep."""


def report_name(name: str) -> str:
    """The file that a report asked for by `name` is written to: never the name of a memory's file."""
    return f"{name}.report"


def part_name(name: str, rank: int, ranks: int) -> str:
    """The file that one tensor-parallel rank writes: its own heads. With one rank it is the whole file."""
    return name if ranks == 1 else f"{name}.rank{rank}of{ranks}"
