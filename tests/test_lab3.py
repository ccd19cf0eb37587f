"""Lab 3: what its text says of the costs of coarse constants and of the gains of better ones."""

import masters
import pytest
from lab_submissions import solved

from nf4lab import FORMATS, mse, quantize


@pytest.fixture(scope="module")
def env():
    return masters.run(solved("lab3"), every_cell=True)


def test_eight_bits_are_nearly_free_on_the_usual_matrix_and_cost_seven_percent_with_the_giant(env):
    usual, giant = ([env["added_error"](env[name], bits) for bits in (8, 4)] for name in ("w", "giant"))
    assert 0 < usual[0] < 0.001 and 0.2 < usual[1] < 0.25
    assert round(giant[0], 2) == 0.07 and 0.9 < giant[1] < 1


def test_the_gain_of_better_constants_is_each_blocks_choice_and_not_one_smaller_factor(env):
    factors = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)
    for name in ("encoder.layer.2.attention.self.key", "encoder.layer.5.output.dense"):
        w = env["matrices"][name]
        exact, chosen, *shared = (
            mse(w, quantize(w, format, 64).dequantize())
            for format in (FORMATS["nf4"], *(FORMATS["nf4"].searched(f) for f in (factors, (0.95,), (0.9,))))
        )
        assert 0.88 < chosen / exact < 0.9
        assert 0.98 < shared[0] / exact < 0.99 and shared[1] > 1.05 * exact
