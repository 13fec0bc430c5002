"""What runs models: their contracts, the runners that compute a batch, loaded weights, and threads for media."""
