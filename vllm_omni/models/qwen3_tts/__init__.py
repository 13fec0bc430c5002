"""Qwen3-TTS: speech along a text, in named, described and cloned voices."""
