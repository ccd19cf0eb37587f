"""Made from labs/lab5/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab5
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q6"
points = None

@test_case(points=1, hidden=False)
def on_small_models(env):
    lab5.check_training_bytes(feedback.given(env, 'training_bytes'), 6)
