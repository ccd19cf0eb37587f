"""Made from labs/lab6/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab6
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q6"
points = None

@test_case(points=2, hidden=False)
def of_a_small_layer(env):
    lab6.check_correct(feedback.given(env, 'correct'), 6, 32)
