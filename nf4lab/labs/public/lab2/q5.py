"""Made from labs/lab2/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab2
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q5"
points = None

@test_case(points=1, hidden=False)
def of_a_few(env):
    lab2.check_bits(feedback.given(env, 'bits_per_weight'), (4096, 64), (101, 64), (100, 32))
