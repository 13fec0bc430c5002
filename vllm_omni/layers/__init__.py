"""What models are built of: attention, projections, norms, rotary positions, sampling, and the reading of weights."""
