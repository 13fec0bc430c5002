"""Stage kinds: what is known of a stage before it is loaded (a spec), and what runs it, a batch a step (an engine)."""
