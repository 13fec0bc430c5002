"""Helpers below everything else: devices, files, validation of numbers."""
