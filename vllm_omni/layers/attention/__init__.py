"""Causal attention over a paged KV cache: the interface, its definition, and what is fast."""
