"""Made from labs/lab5/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab5
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q3"
points = None

@test_case(points=2, hidden=False)
def values_and_buffers(env):
    lab5.check_layer(feedback.given(env, 'Linear4bit'), 3)
