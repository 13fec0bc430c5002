"""Trains and judges `vllm_omni/assets/tiny-audio`: notes, chords, four timbres, at 16 kHz."""
