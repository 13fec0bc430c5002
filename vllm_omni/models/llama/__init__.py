"""Llama, dense."""
