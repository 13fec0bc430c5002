"""The stage kind `diffusers`: any pipeline of diffusers, hosted as it is."""
