"""Made from labs/lab2/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab2
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q2"
points = None

@test_case(points=1, hidden=False)
def of_small_blocks(env):
    f = feedback.given(env, 'encode')
    lab2.check_encode(f, torch.linspace(-1, 1, 64), 16)
    lab2.check_encode(f, torch.tensor([0.5, -2.0, 0.1] * 7), 16)
    lab2.check_encode(f, torch.tensor([0.0] * 16 + [3.0, -1.0] * 8), 16)
