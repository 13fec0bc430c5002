"""Wan: videos of words, and from a first frame."""
