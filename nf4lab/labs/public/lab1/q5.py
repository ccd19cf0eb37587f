"""Made from labs/lab1/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab1
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q5"
points = None

@test_case(points=1, hidden=False)
def equals_the_published_table(env):
    lab1.check_nf4(feedback.given(env, 'nf4'), 0.9677083)
