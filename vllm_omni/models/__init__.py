"""Models, one per file, and how their weights are loaded and shared."""
