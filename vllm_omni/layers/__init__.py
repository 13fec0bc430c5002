"""Building blocks of language models: paged attention, norms, rotary positions, fused projections, sampling."""
