"""Engines that ours is compared with, in environments of their own outside the project's: `python -m tools.peers` makes
them. Without them a suite says so and goes on.
"""
