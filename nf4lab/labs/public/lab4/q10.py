"""Made from labs/lab4/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab4
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q10"
points = None

@test_case(points=1, hidden=False)
def on_whole_blocks(env):
    lab4.check_quantize(feedback.given(env, 'quantize'), lab4.weights(10, 320))

@test_case(points=1, hidden=False)
def on_zeros_a_short_block_and_ties(env):
    lab4.check_quantize(feedback.given(env, 'quantize'), lab4.long_with_edges(10))

@test_case(points=1, hidden=False)
def with_no_value_read_twice(env):
    lab4.check_quantize_traffic(feedback.given(env, 'quantize'), 10)
