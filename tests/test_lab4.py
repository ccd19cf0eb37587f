"""Lab 4: its kernels on a GPU, compiled without one; a wrong answer costs no points where others call it.

Kernels are traced here, and launched too where there is a GPU or where NUMBA_ENABLE_CUDASIM=1.
"""

import masters
import pytest
from lab_submissions import changed, solved

from nf4lab.labs import lab4


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_the_kernels_compile_for_gpus_and_stay_in_float32(capability):
    types, assemble = compiler()
    env = masters.run(solved("lab4"))
    for name, ptx in compiled(env, types, assemble, capability).items():
        assert ".f64" not in ptx and "fma" not in ptx, name  # a fused product would round elsewhere


def test_one_over_absmax_is_a_float64_on_a_gpu_as_the_lab_says():
    types, assemble = compiler()
    env = masters.run(changed("lab4", "q10", {"float32(1) / scale": "1 / scale"}))
    assert ".f64" in compiled(env, types, assemble, (7, 5))["quantize"]


def test_a_wrong_code_of_costs_nothing_in_the_questions_that_call_it():
    env = masters.run(changed("lab4", "q8", {"s > boundaries[b]": "s < boundaries[b]"}))
    assert masters.outcome("lab4", env, ["q8", "q9", "q10"])[0] == masters.possible("lab4", ["q9", "q10"])


def test_the_last_kernel_of_chapter_16_leaves_words_free_as_the_lab_says():
    pytest.importorskip("numba_cuda", reason="needs numba-cuda")
    from nf4lab.kernels.cuda import few_rows

    words = few_rows.SEGMENT // 8
    assert words < few_rows.PITCH
    lab4.check_place(lambda row, word, width: row * few_rows.PITCH + word, (8, words))


def compiler():
    if masters.SIMULATOR != "0":
        pytest.skip("the simulator compiles nothing: run without NUMBA_ENABLE_CUDASIM")
    pytest.importorskip("numba_cuda", reason="needs numba-cuda")
    pytest.importorskip("cuda.bindings.nvjitlink", reason="needs cuda-bindings")
    from numba import types

    from nf4lab.kernels.cuda.assemble import assemble

    return types, assemble


def compiled(env, types, assemble, capability):
    """The PTX of the lab's kernels by name, compiled and linked without a GPU."""
    byte, half, single = (types.Array(t, 1, "C") for t in (types.uint8, types.float16, types.float32))
    signatures = dict.fromkeys(("v1", "v2", "v3"), (byte, single, single, half)) | {
        "quantize": (single, single, byte, single)
    }
    found = {name: assemble(env[name], signature, capability)[0] for name, signature in signatures.items()}
    return {name: ptx.decode() if isinstance(ptx, bytes) else ptx for name, ptx in found.items()}
