"""The configuration of a memory, in the form that MemOS publishes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator

from kvmem import compaction, storage
from kvmem.compaction import CompactionStrategy
from kvmem.engines import Backend, backend_class
from kvmem.errors import ConfigError, check_kind, config_error
from kvmem.merge import MergeStrategy, strategy
from kvmem.prompt import TemplateKind, check_template_kwargs

NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")


class ExtractorLLM(BaseModel):
    """Which engine builds and injects the caches: its name, and its own configuration, checked by the engine."""

    model_config = ConfigDict(extra="forbid")

    backend: str
    config: Any

    def backend_class(self) -> type[Backend]:
        return backend_class(self.backend)


class KVCacheMemoryConfig(BaseModel):
    """The engine, as `extractor_llm={"backend": "huggingface", "config": {"model_name_or_path": …}}`, and the prompt.

    memory_filename: its suffix picks the file format. merge: a strategy or its name. compaction: a strategy or its
    name, by which `extract` and `from_textual_memory` compact what they build; None: not at all. template: `chat` or
    `plain`.
    chat_template_kwargs: the chat template's own arguments, such as `enable_thinking` or `tools`; JSON values.
    separator: the text between merged memories. namespace: only memories of the same namespace are found, listed,
    merged, loaded and deleted; their files are in a folder of that name. copy_files: `load` copies the tensors instead
    of mapping them from the file (safetensors, on a CPU), so that what happens to the file later does not matter.

    Raises ConfigError for an unknown key, naming the nearest known one, and for a bad value.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    extractor_llm: ExtractorLLM
    memory_filename: str = "activation_memory.safetensors"
    merge: MergeStrategy = Field(default_factory=lambda: strategy("Reprefill"))
    compaction: CompactionStrategy | None = None
    template: TemplateKind = "chat"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    separator: str = "\n\n"
    namespace: str = ""
    copy_files: bool = False

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as error:
            known = set(type(self).model_fields) | set(ExtractorLLM.model_fields)
            raise config_error("KVCacheMemoryConfig", error, known) from None
        check_template_kwargs(self.chat_template_kwargs, self.template)
        llm = self.extractor_llm
        kind = llm.backend_class().config_class
        if not isinstance(llm.config, kind):
            if not isinstance(llm.config, dict):
                raise ConfigError(f"extractor_llm.config is {llm.config!r}. Give a dictionary, or a {kind.__name__}.")
            try:
                llm.config = kind(**llm.config)
            except pydantic.ValidationError as error:
                known = {field.name for field in dataclasses.fields(kind)}
                raise config_error("extractor_llm.config", error, known) from None

    @field_validator("merge", mode="before")
    @classmethod
    def _merge_by_name(cls, value: Any) -> Any:
        if not isinstance(value, str | MergeStrategy):
            raise ValueError(f"merge is {value!r}. Give a strategy or its name, or leave it out for Reprefill.")
        return strategy(value) if isinstance(value, str) else value

    @field_validator("compaction", mode="before")
    @classmethod
    def _compaction_by_name(cls, value: Any) -> Any:
        if not isinstance(value, str | CompactionStrategy | None):
            raise ValueError(f"compaction is {value!r}. Give a strategy or its name, or leave it out for none.")
        return compaction.strategy(value) if isinstance(value, str) else value

    @field_validator("namespace")
    @classmethod
    def _safe_namespace(cls, value: str) -> str:
        if fault := namespace_fault(value):
            raise ValueError(fault)
        return value

    @field_validator("memory_filename")
    @classmethod
    def _known_suffix(cls, value: str) -> str:
        storage.for_filename(value)
        return value


def namespace_fault(name: str) -> str:
    """Why a name can't be that of a namespace, as a sentence; "" if it can. "" is the default namespace."""
    if not name or NAMESPACE.fullmatch(name):
        return ""
    return (
        f"The namespace is {name!r}. Give letters, digits, '.', '_', '-' or '@', at most 100, and a letter or a digit "
        "first: it names a folder. For other names, give a hash of them."
    )


def check_namespace(name: str) -> None:
    """Raises ArgumentError unless the name is a text, and ConfigError unless it can be that of a namespace."""
    check_kind("A namespace", name, str, way_out="Give its name.")
    if fault := namespace_fault(name):
        raise ConfigError(fault)
