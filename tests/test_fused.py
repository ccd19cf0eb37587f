"""Which kernel a product takes, and whether its launch fits the GPU: no GPU is needed to say it."""

import json

import pytest
import torch

from nf4lab.kernels.cuda import crossover, fused, gemv_kernels
from nf4lab.kernels.cuda.launch import SIMULATOR

pytestmark = pytest.mark.skipif(SIMULATOR, reason="the simulator's layouts are smaller")


def test_what_a_version_cannot_take_the_next_below_does(monkeypatch):
    def takes(version, *case):
        kernel = fused.launches(version, *case)[0].kernel
        return kernel.py_func.__name__ if kernel not in gemv_kernels.TENSOR_CORES.values() else "v3"

    monkeypatch.setattr(fused, "SIMULATOR", False)
    monkeypatch.setattr(fused, "shared_limit", lambda device: 232448)
    monkeypatch.setattr(fused, "processors", lambda device: 132)
    monkeypatch.setattr(
        fused, "capability", lambda device: {-12: (12, 0), -10: (10, 0), -9: (9, 0), -8: (8, 0), -7: (7, 5)}[device]
    )
    half, hopper, ampere, turing = torch.float16, -9, -8, -7
    assert takes("v6", 1, 14336, 4096, 64, half, hopper, True) == "v6"
    assert takes("v6", 129, 14336, 4096, 64, half, hopper, True) == "v2"
    assert takes("v6", 8, 14336, 4096, 32, half, hopper, True) == "v4"
    assert takes("v6", 64, 14336, 4096, 64, half, ampere, True) == "v4"
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
    for n, of_v5, of_v4 in ((14336, 8, 8), (8448, 2, 2), (4225, 2, 2), (4224, 8, 8), (2113, 8, 8), (2112, 8, 64)):
        by_rows = [takes("fastest", rows, n, 4096, 64, half, hopper, True) for rows in range(1, 129)]
        assert by_rows == ["v5"] * of_v5 + ["v4"] * (of_v4 - of_v5) + ["v6"] * (128 - of_v4)
    for later in (-10, -12):  # GPUs after Hopper have bulk copies and no warpgroups
        by_version = [takes(version, 8, 14336, 4096, 64, half, later, True) for version in ("v6", "v5", "fastest")]
        assert by_version == ["v5"] * 3
        by_rows = [takes("fastest", rows, 14336, 4096, 64, half, later, True) for rows in (9, 33, 64)]
        assert by_rows == ["v4"] * 3 and takes("v6", 64, 14336, 4096, 64, half, later, True) == "v4"
    cases = ((4096, 64, hopper), (4096, 32, hopper), (4096, 64, ampere), (4096, 64, -10), (4096, 64, -12))
    assert [fused.most_rows(*case) for case in cases] == [128, 64, 64, 64, 64]


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 24, 32, 48, 64, 128])
@pytest.mark.parametrize(
    ("n", "k"), [(1024, 4096), (14336, 4096), (28672, 8192), (8192, 28672), (151936, 2048), (7, 64)]
)
def test_every_launch_fits_the_smallest_and_the_largest_shared_memory(n, k, rows, monkeypatch):
    monkeypatch.setattr(fused, "SIMULATOR", False)
    monkeypatch.setattr(fused, "processors", lambda device: 132)
    monkeypatch.setattr(fused, "capability", lambda device: (9, 0) if device == -20 else (8, 6))
    for device, limit in ((-20, 232448), (-21, 101376)):
        monkeypatch.setattr(fused, "shared_limit", lambda device, limit=limit: limit)
        (one,) = fused.launches.__wrapped__("fastest", rows, n, k, 64, torch.bfloat16, device, True)
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


@pytest.mark.parametrize("rows", [9, 48, 64, 128])
@pytest.mark.parametrize(("n", "grid", "warpgroups"), [(8192, 128, 4), (14336, 128, 4), (4096, 128, 4)])
def test_a_hopper_has_room_for_one_round_of_all_warpgroups(n, grid, warpgroups, rows, monkeypatch):
    """To 64 rows of x four warpgroups a thread block, above two, which have twice the registers."""
    monkeypatch.setattr(fused, "SIMULATOR", False)
    monkeypatch.setattr(fused, "processors", lambda device: 132)
    monkeypatch.setattr(fused, "capability", lambda device: (9, 0))
    monkeypatch.setattr(fused, "shared_limit", lambda device: 232448)
    (one,) = fused.launches.__wrapped__("v6", rows, n, 8192, 64, torch.bfloat16, -21, True)
    assert (one.grid, one.threads) == (grid, 128 * (warpgroups if rows <= 64 else 2))
