"""Trains and judges a small speaking model in the format of Qwen3-TTS: the words of tools.tiny.speech, in one voice."""
