"""Made from labs/lab1/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab1
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q4"
points = None

@test_case(points=1, hidden=False)
def at_the_published_tail(env):
    lab1.check_normal_float(feedback.given(env, 'normal_float'), 0.9677083)
