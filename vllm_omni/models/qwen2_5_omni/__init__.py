"""Qwen2.5-Omni: thinker and talker."""
