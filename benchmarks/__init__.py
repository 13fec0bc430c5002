"""Measurements of the package: against its peers, against this machine's limits, and of itself."""
