"""Runners: they hold weights and device memory and run one batch."""
