"""Where levels come from: every function returns float32 levels indexed by code, and derives them.

closed     quantiles, uniform grids, small floats, the best levels for a density: NF4, FP4, E2M1, SF4, …; and the
           normal density, which all functions take by default
blocks     levels that know the block: AF4, BOF4, BOF4-S, the best for any block size, density or weights
lloyd      Lloyd's algorithm for blocks, which the best levels come from
extremes   how the extremes of a random block are distributed
"""

from nf4lab.codebooks.blocks import af4, bof4, bof4_s, fit, optimal
from nf4lab.codebooks.closed import (
    TAIL,
    cube_root,
    dynamic_map,
    e2m1,
    fp4,
    iq4_nl,
    lloyd_max,
    nf2,
    nf3,
    nf4,
    quantile_midpoints,
    sf4,
    side_quantiles,
    split_quantiles,
    symmetric_int,
    twos_complement,
    uniform,
)  # fmt: skip

__all__ = [
    "TAIL", "af4", "bof4", "bof4_s", "cube_root", "dynamic_map", "e2m1", "fit", "fp4", "iq4_nl", "lloyd_max", "nf2",
    "nf3", "nf4", "optimal", "quantile_midpoints", "sf4", "side_quantiles", "split_quantiles", "symmetric_int",
    "twos_complement", "uniform",
]  # fmt: skip
