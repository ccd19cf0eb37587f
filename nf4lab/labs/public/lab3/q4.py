"""Made from labs/lab3/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab3
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q4"
points = None

@test_case(points=1, hidden=False)
def on_normal_weights(env):
    w = torch.randn(2 ** 15, generator=torch.Generator().manual_seed(3))
    lab3.check_added_error(feedback.given(env, 'added_error'), (w, 4), (w, 5))
