"""Made from labs/lab3/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab3
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q3"
points = None

@test_case(points=1, hidden=False)
def of_one_matrix(env):
    cases = ((384 * 384, 64, 8, 256), (10001, 32, 4, 64), (10017, 32, 4, 64))
    lab3.check_bits(feedback.given(env, 'bits_per_weight'), *cases)
