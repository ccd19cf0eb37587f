"""Made from labs/lab3/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab3
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q5"
points = None

@test_case(points=1, hidden=False)
def of_normal_blocks(env):
    w = torch.randn(40 * 64 + 10, generator=torch.Generator().manual_seed(5))
    lab3.check_best_scale(feedback.given(env, 'best_scale'), w, 64, [0.8, 0.9, 1.0, 1.1])
