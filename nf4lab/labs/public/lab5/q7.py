"""Made from labs/lab5/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab5
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q7"
points = None

@test_case(points=4, hidden=False)
def losses_of_four_steps(env):
    lab5.check_finetune(feedback.given(env, 'finetune'), 7)
