"""File formats for memories. Each format is one file, chosen by the suffix of the file's name.

A file is written beside its target and renamed, so a crash leaves either the old or the new file. It is verified before
anything in it is used. `.safetensors` is the default; `.pickle` and `.pkl` exchange memories with MemOS.

The module `manifest` is also used as a namespace: it holds what a file states about its items.
"""

from kvmem.storage import manifest
from kvmem.storage.atomic_write import remove_abandoned, replacing, write_all
from kvmem.storage.base import FORMATS, Storage, for_filename, opened
from kvmem.storage.item_reader import ItemHead, ItemReader, Target, opened_item, read_head
from kvmem.storage.manifest import ItemManifest
from kvmem.storage.namespace import namespace_folder
from kvmem.storage.region_reader import ProcessReader, SharedMemory, ThreadReader
from kvmem.storage.safetensors_file import SafetensorsFile
from kvmem.storage.temporary_folder import TemporaryFolder

__all__ = [
    "FORMATS",
    "ItemHead",
    "ItemManifest",
    "ItemReader",
    "ProcessReader",
    "SafetensorsFile",
    "SharedMemory",
    "Storage",
    "Target",
    "TemporaryFolder",
    "ThreadReader",
    "for_filename",
    "manifest",
    "namespace_folder",
    "opened",
    "opened_item",
    "read_head",
    "remove_abandoned",
    "replacing",
    "write_all",
]
