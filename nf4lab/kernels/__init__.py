"""The numba kernels: they take arrays and know nothing of the rest of the package."""
