"""The language model of Qwen3-VL."""
