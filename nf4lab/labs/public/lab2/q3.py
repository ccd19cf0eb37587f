"""Made from labs/lab2/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab2
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q3"
points = None

@test_case(points=1, hidden=False)
def of_three_codes(env):
    lab2.check_pack(feedback.given(env, 'pack'), torch.tensor([12, 3, 10], dtype=torch.uint8))
    lab2.check_unpack(feedback.given(env, 'unpack'), torch.tensor([195, 167], dtype=torch.uint8), 3)
