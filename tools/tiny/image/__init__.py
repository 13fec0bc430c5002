"""The small picture model: its world, its data, its training, its judge."""
