"""Made from labs/lab1/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab1
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q1"
points = None

@test_case(points=1, hidden=False)
def on_round_numbers(env):
    lab1.check_symmetric(feedback.given(env, 'symmetric'), (7.0, 4), (1.0, 3))
    lab1.check_min_max(feedback.given(env, 'min_max'), (-1.0, 14.0, 16), (0.0, 1.0, 3))
