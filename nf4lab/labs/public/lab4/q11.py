"""Made from labs/lab4/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab4
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q11"
points = None

@test_case(points=1, hidden=False)
def on_eight_rows(env):
    lab4.check_place(feedback.given(env, 'place'), (8, 32))

@test_case(points=1, hidden=False)
def on_a_wider_tile_of_more_rows(env):
    lab4.check_place(feedback.given(env, 'place'), (16, 96))
