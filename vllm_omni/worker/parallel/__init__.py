"""Several ranks that share one model: their processes, how they are connected, and what each is told to compute."""
