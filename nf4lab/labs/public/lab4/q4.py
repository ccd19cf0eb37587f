"""Made from labs/lab4/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab4
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q4"
points = None

@test_case(points=1, hidden=False)
def on_round_sizes(env):
    lab4.check_blocks_for(feedback.given(env, 'blocks_for'), 4)
