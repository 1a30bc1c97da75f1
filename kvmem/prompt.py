"""Text and chat template -> token ids, and the split that says which of them a memory already holds."""
