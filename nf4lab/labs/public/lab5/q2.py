"""Made from labs/lab5/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab5
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q2"
points = None

@test_case(points=1, hidden=False)
def forward(env):
    lab5.check_forward(feedback.given(env, 'FourBitMatmul'), 2)

@test_case(points=2, hidden=False)
def backward(env):
    lab5.check_backward(feedback.given(env, 'FourBitMatmul'), 2)

@test_case(points=1, hidden=False)
def what_is_kept(env):
    lab5.check_memory(feedback.given(env, 'FourBitMatmul'), 2)
