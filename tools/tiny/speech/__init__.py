"""Trains and judges `vllm_omni/assets/tiny-speech`: a voice that reads out one to five words it knows."""
