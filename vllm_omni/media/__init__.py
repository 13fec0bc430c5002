"""Pictures, sounds and films: what a caller brings, read within limits; what a caller gets, written to files."""
