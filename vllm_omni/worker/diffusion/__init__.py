"""Runs diffusion models: their contract and one denoising step of a batch."""
