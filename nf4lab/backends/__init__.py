"""Who does the work: the torch reference, the numba kernels on the CPU, or those on a GPU. All give the same bytes."""

from nf4lab.backends.choice import *  # noqa: F403
