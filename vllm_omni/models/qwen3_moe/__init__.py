"""Qwen3 with sparse experts."""
