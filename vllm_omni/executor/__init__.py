"""Stage executors (where an engine runs) and the one loop that drives them all."""
