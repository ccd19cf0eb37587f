"""Made from labs/lab3/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab3
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q2"
points = None

@test_case(points=1, hidden=False)
def of_three_groups(env):
    absmax = torch.tensor([2.0, 3.0, 2.5, 4.0, 1.0, 2.3, 2.7, 2.5, 1.9, 3.1])
    lab3.check_dequantize_constants(feedback.given(env, 'dequantize_constants'), absmax, 4, 4)
