"""The fast Walsh-Hadamard transform on the GPU: a thread block takes a row through all stages in shared memory.

The row is read once and written once; in between, log2 n stages of additions with a barrier after each.
"""

from numba import config, cuda, float32, int32, int64

from nf4lab.kernels.cuda.launch import launch

WIDEST = 8192  # float32 in the 32 KB of shared memory that a block gets without asking
THREADS = 32 if config.ENABLE_CUDASIM else 256


@cuda.jit
def butterflies(rows, n):
    values = cuda.shared.array(WIDEST, float32)
    first = int64(cuda.blockIdx.x) * n
    width = int32(n)
    thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
    for i in range(thread, width, threads):
        values[i] = rows[first + i]
    cuda.syncthreads()
    apart = int32(1)
    while apart < width:
        for pair in range(thread, width >> 1, threads):
            low = int32(((pair & ~(apart - 1)) << 1) + (pair & (apart - 1)))
            a, b = values[low], values[low + apart]
            values[low], values[low + apart] = a + b, a - b
        cuda.syncthreads()
        apart = int32(apart << 1)
    for i in range(thread, width, threads):
        rows[first + i] = values[i]


def butterflies_(rows):
    """Each row of a contiguous float32 GPU tensor (n_rows, n), n a power of two up to WIDEST, in place."""
    if rows.numel():
        launch(butterflies, len(rows), THREADS, (rows, rows.shape[1]), dtype=rows.dtype)
