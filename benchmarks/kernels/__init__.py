"""Sparse prefill kernels against dense ones and MInference: `python -m benchmarks.kernels`."""
