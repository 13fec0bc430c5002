"""LoRA files: found, read within limits, fitted to a model, kept."""
