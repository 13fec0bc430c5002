"""The stage kind `ar`: a language model that writes, or gives hidden states."""
