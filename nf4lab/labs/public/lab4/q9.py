"""Made from labs/lab4/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab4
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q9"
points = None

@test_case(points=1, hidden=False)
def on_a_whole_block(env):
    blocks = [lab4.weights(seed, 64) for seed in (9, 90)]
    lab4.check_quantize_block(feedback.given(env, 'quantize_block'), *blocks)

@test_case(points=1, hidden=False)
def on_zeros_short_blocks_and_ties(env):
    lab4.check_quantize_block(feedback.given(env, 'quantize_block'), *lab4.blocks_with_edges(9))
