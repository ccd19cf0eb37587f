"""Made from labs/lab4/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab4
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q7"
points = None

@test_case(points=1, hidden=False)
def on_whole_rounds(env):
    lab4.check_kernel(feedback.given(env, 'v3'), (256, 256, 32, 4), (1024, 1024, 32, 4))

@test_case(points=1, hidden=False)
def with_an_odd_rest_and_idle_threads(env):
    lab4.check_kernel(feedback.given(env, 'v3'), *[(n, n, 32, 3) for n in (1, 333, 1280)])

@test_case(points=1, hidden=False)
def with_neighbours_side_by_side(env):
    lab4.check_kernel_traffic(feedback.given(env, 'v3'), 7, blocks=4, threads=32, table=True)
