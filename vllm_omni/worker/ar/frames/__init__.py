"""Codes of a frame but the first: the small decoder that writes them, and how it runs."""
