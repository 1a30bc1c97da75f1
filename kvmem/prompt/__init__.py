"""From text and chat templates to token ids, and the split of a prompt into its cached part and the rest.

`PromptTemplate` renders and tokenizes memory and query together. `TokenizedPrompt` is the verified split: the cached
token ids are compared with those of every prompt. `with_ids_from_text` recovers the token ids of a memory whose file
does not state them (MemOS's pickles).
"""

from kvmem.prompt.recover_ids import with_ids_from_text
from kvmem.prompt.template import (
    PromptTemplate,
    Query,
    TemplateKind,
    TokenizedPrompt,
    check_template_kwargs,
    common_prefix,
)

__all__ = [
    "PromptTemplate",
    "Query",
    "TemplateKind",
    "TokenizedPrompt",
    "check_template_kwargs",
    "common_prefix",
    "with_ids_from_text",
]
