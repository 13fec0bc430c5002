"""Kernels in Triton for what stands between the products of a layer, on CUDA; attention's are in `layers.attention`."""
