"""Made from labs/lab1/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab1
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q3"
points = None

@test_case(points=1, hidden=False)
def of_four(env):
    lab1.check_equal_shares(feedback.given(env, 'equal_shares'), 4, 6)
