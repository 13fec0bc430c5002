"""Denoising steps of a DiT stage: whose turn it is, and what earlier steps leave for later ones."""
