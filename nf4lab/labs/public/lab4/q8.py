"""Made from labs/lab4/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab4
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q8"
points = None

@test_case(points=1, hidden=False)
def on_levels_and_ties(env):
    lab4.check_code_of(feedback.given(env, 'code_of'), 8)
