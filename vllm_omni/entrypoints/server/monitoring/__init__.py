"""What the server tells of itself: metrics, timelines, traces, whether it is ready."""
