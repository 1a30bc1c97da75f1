"""What several tests share: tiny models, items without a model, MemOS's classes, sample rows, a rank under torchrun."""
