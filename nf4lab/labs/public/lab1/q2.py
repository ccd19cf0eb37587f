"""Made from labs/lab1/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab1
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q2"
points = None

@test_case(points=1, hidden=False)
def on_three_levels(env):
    w = torch.tensor([-9.0, -0.6, -0.5, -0.4, 0.0, 1.0, 1.5, 1.6, 9.0])
    lab1.check_nearest(feedback.given(env, 'nearest'), w, torch.tensor([-1.0, 0.0, 2.0, 5.0]))
