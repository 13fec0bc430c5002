"""Helpers below everything else: devices, validation of numbers, logging."""
