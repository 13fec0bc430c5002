"""The language model of Qwen2.5-VL."""
