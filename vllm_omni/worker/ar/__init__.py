"""Runs language models: their contract, the KV pool, the batch of one step."""
