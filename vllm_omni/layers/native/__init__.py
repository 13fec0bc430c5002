"""The package's own CPU kernels (csrc/cpu): found, loaded and called. Each has its definition in torch elsewhere."""
