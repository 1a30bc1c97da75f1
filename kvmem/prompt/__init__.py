"""Text and chat templates to token ids, and the split of a prompt into its cached part and the rest.

`PromptTemplate` renders and tokenises a memory with its query once, as a whole, so that the cached token ids can be
verified against every prompt. `recover_ids` finds the token ids of memories whose file does not state them.
"""

from kvmem.prompt.recover_ids import with_ids_from_text
from kvmem.prompt.template import PromptTemplate, Query, TemplateKind, TokenizedPrompt, common_prefix

__all__ = ["PromptTemplate", "Query", "TemplateKind", "TokenizedPrompt", "common_prefix", "with_ids_from_text"]
