"""The stage kind `dit`: a diffusion model that makes pictures or sound."""
