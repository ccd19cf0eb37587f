"""Made from labs/lab4/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab4
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q1"
points = None

@test_case(points=1, hidden=False)
def on_requests_of_chapter_7(env):
    lab4.check_sectors(feedback.given(env, 'sectors'), 1)
