"""Step caches: per request and guidance branch, they decide which denoising steps may reuse earlier work."""
