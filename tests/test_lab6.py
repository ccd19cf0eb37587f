"""Lab 6: what its text says of the measurement, from the master's own cells."""

import masters
import pytest
from lab_submissions import solved

pytest.importorskip("glassllm")


def test_texts_of_every_kind_gain_and_those_that_it_was_made_with_the_most():
    env = masters.run(solved("lab6"), every_cell=True)
    w, moments, error = (env[name] for name in ("w", "second_moments", "output_error"))
    gains = [
        error(w, env["corrected"], moments(env[x])) / error(w, env["nearest"], moments(env[x]))
        for x in ("calibration", "others", "log")
    ]
    assert gains == sorted(gains) and gains[0] < 0.6 and 1.08 * gains[1] < gains[2] < 0.75
    assert (env["theirs"] == env["correct"](w, env["H"], 64)[0]).float().mean() > 0.98
