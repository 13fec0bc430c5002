"""Qwen3-TTS folders of published shapes, written without a published one."""
