"""Which kernel a product takes, and whether its launch fits the GPU: no GPU is needed to say it."""

import json

import pytest
import torch

from nf4lab.kernels.cuda import crossover, few_rows, fused, gemm_kernels, gemv_kernels
from nf4lab.kernels.cuda.launch import SIMULATOR

pytestmark = pytest.mark.skipif(SIMULATOR, reason="the simulator's layouts are smaller")


def test_what_a_version_cannot_take_the_next_below_does(monkeypatch):
    def takes(version, *case):
        kernel = fused.launches(version, *case)[0].kernel
        of_gemm = {"nf4lab.kernels.cuda.gemm_kernels": "v4"}.get(kernel.py_func.__module__)
        return of_gemm or next(name for name, kind in kinds.items() if kernel in kind)

    monkeypatch.setattr(fused, "SIMULATOR", False)
    monkeypatch.setattr(fused, "shared_limit", lambda device: 232448)
    monkeypatch.setattr(fused, "processors", lambda device: 132)
    monkeypatch.setattr(fused, "capability", lambda device: {-9: (9, 0), -8: (8, 0), -7: (7, 5)}[device])
    v4 = [gemm_kernels.kernel(way) for e in (1, 2, 4, 8) for t in (1, 2, 7) for way in gemm_kernels.layouts(e, t, 64)]
    v4 += [gemm_kernels.kernel(way) for way in gemm_kernels.layouts(1, 7, 32)]
    kinds = {"v1": [gemv_kernels.v1], "v2": [gemv_kernels.v2], "v3": list(gemv_kernels.TENSOR_CORES.values())}
    kinds |= {"v4": v4, "v5": [few_rows.kernel(stages) for stages in (3, 4)]}
    half, hopper, ampere, turing = torch.float16, -9, -8, -7
    assert takes("v5", 1, 14336, 4096, 64, half, hopper, True) == "v5"
    assert takes("v5", 9, 14336, 4096, 64, half, hopper, True) == "v4"
    assert takes("v5", 1, 14336, 4096, 32, half, hopper, True) == "v4"
    assert takes("v5", 1, 14336, 4096, 64, half, ampere, True) == "v4"
    assert takes("v3", 1, 14336, 4096, 64, half, ampere, True) == "v3"
    assert takes("v5", 1, 14336, 4096, 64, half, turing, True) == "v2"
    assert takes("v5", 1, 14336, 4096, 64, torch.float32, hopper, True) == "v2"
    assert takes("v5", 1, 14336, 4096 + 32, 64, half, hopper, True) == "v2"
    assert takes("v5", 1, 14336, 4096, 64, half, hopper, False) == "v1"
    assert takes("v5", 1, 14336, 4096, 16, half, hopper, True) == "v1"


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 32, 64])
@pytest.mark.parametrize(
    ("n", "k"), [(1024, 4096), (14336, 4096), (28672, 8192), (8192, 28672), (151936, 2048), (7, 64)]
)
def test_every_launch_fits_the_smallest_and_the_largest_shared_memory(n, k, rows, monkeypatch):
    monkeypatch.setattr(fused, "SIMULATOR", False)
    monkeypatch.setattr(fused, "processors", lambda device: 132)
    monkeypatch.setattr(fused, "capability", lambda device: (9, 0) if device == -20 else (8, 6))
    for device, limit in ((-20, 232448), (-21, 101376)):
        monkeypatch.setattr(fused, "shared_limit", lambda device, limit=limit: limit)
        (one,) = fused.launches.__wrapped__("v5", rows, n, k, 64, torch.bfloat16, device, True)
        assert one.shared_bytes <= limit
        if one.kernel is not gemv_kernels.v2:  # it takes what has no room for a tile
            tiles = one.numbers[0] if one.numbers else -(-n // (16 * one.grid))
            assert one.grid * tiles * 16 >= n > (one.grid - 1) * tiles * 16


def test_rows_worth_it_are_those_of_the_nearest_shape_in_the_table(monkeypatch):
    monkeypatch.setattr(crossover, "table_for", lambda device: {(1024, 4096): 16, (14336, 4096): 64})
    assert crossover.rows_worth_it(1024, 4096, torch.bfloat16, 0) == 16
    assert crossover.rows_worth_it(1100, 5000, torch.float16, 0) == 16
    assert crossover.rows_worth_it(11008, 4096, torch.bfloat16, 0) == 64
    assert crossover.rows_worth_it(14336, 4096, torch.float32, 0) == 16


def test_the_table_ends_before_the_first_row_count_that_is_over_three_percent_slower():
    def entry(rows, fused_us):
        return {"n": 64, "k": 128, "rows": rows, "fused_us": fused_us, "dequantized_us": 10.0}

    measured = [entry(8, 5.0), entry(16, 10.2), entry(24, 10.4), entry(32, 9.0)]
    assert crossover.most_rows(measured) == {(64, 128): 16}


def test_a_table_measured_here_replaces_the_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.setattr(crossover, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    read = crossover.table_for.__wrapped__
    assert read(0) == crossover.H200
    crossover.path_for("NVIDIA Test").write_text(json.dumps({"rows": [[64, 128, 24]]}))
    assert read(0) == {(64, 128): 24}
    crossover.path_for("NVIDIA Test").write_text("no table")
    assert read(0) == crossover.H200
