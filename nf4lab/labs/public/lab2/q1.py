"""Made from labs/lab2/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab2
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q1"
points = None

@test_case(points=1, hidden=False)
def of_three_rows(env):
    w = torch.arange(120.0).reshape(3, 40) - 100
    lab2.check_absmax(feedback.given(env, 'block_absmax'), w, 64)
    lab2.check_absmax(feedback.given(env, 'block_absmax'), w, 16)
