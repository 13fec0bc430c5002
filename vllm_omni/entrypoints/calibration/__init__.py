"""Numbers of step caches that belong to one model: from what was recorded to what stands in a config."""
