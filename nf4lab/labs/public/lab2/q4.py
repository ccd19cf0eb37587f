"""Made from labs/lab2/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab2
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q4"
points = None

@test_case(points=1, hidden=False)
def of_two_blocks(env):
    lab2.check_decode(feedback.given(env, 'decode'), torch.tensor([2.0, -1.0] * 8 + [0.25, 4.0, -3.0]), 16)
