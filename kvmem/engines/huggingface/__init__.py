"""The transformers engine: on one device (`backend`), or tensor parallel (`tensor_parallel`)."""

from kvmem.engines.huggingface.backend import HFBackend, held_by, origin_of
from kvmem.engines.huggingface.config import DTYPES, HFConfig
from kvmem.engines.huggingface.tensor_parallel import HFRanksBackend, HFRanksConfig

__all__ = ["DTYPES", "HFBackend", "HFConfig", "HFRanksBackend", "HFRanksConfig", "held_by", "origin_of"]
