"""Pictures of results: timelines, waveforms with spectrograms."""
