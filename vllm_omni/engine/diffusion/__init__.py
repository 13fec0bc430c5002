"""The stage kind `dit`: a diffusion model that makes images or audio."""
