"""Qwen3-Omni: thinker, talker and code2wav."""
