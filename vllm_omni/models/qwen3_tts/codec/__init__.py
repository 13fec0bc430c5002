"""The speech tokenizer: codes to audio frame by frame, and reference audio to codes and a speaker's vector."""
