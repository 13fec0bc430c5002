"""Qwen2.5-Omni's token2wav: codes to a waveform."""
