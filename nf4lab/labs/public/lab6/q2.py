"""Made from labs/lab6/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab6
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q2"
points = None

@test_case(points=1, hidden=False)
def of_small_layers(env):
    lab6.check_output_error(feedback.given(env, 'output_error'), 2)
