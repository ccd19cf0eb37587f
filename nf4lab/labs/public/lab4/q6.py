"""Made from labs/lab4/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab4
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q6"
points = None

@test_case(points=1, hidden=False)
def on_whole_blocks(env):
    lab4.check_kernel(feedback.given(env, 'v2'), (6, 1024))

@test_case(points=1, hidden=False)
def with_an_odd_rest_and_idle_threads(env):
    lab4.check_kernel(feedback.given(env, 'v2'), *[(n, n, 64) for n in (1, 640, 333)])

@test_case(points=1, hidden=False)
def with_levels_read_once_a_thread_block(env):
    lab4.check_kernel_traffic(feedback.given(env, 'v2'), 6, table=True)
