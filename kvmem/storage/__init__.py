"""File formats: one in each file, chosen by the suffix of the file's name.

A file is written beside its target and renamed, so a crash leaves the old file or the new one. It is verified
before anything that it holds is used.
"""

from kvmem.storage.atomic_write import replacing, write_all
from kvmem.storage.base import FORMATS, Storage, for_filename
from kvmem.storage.manifest import ItemManifest
from kvmem.storage.safetensors_file import SafetensorsFile, read_token_ids

__all__ = [
    "FORMATS",
    "ItemManifest",
    "SafetensorsFile",
    "Storage",
    "for_filename",
    "read_token_ids",
    "replacing",
    "write_all",
]
