"""Sequences of an AR stage: their tokens, KV blocks and turns. Holds numbers only."""
