"""The stage kind `umt5`: a prompt -> the states that the Wan transformer reads."""
