"""Made from labs/lab2/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab2
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q6"
points = None

@test_case(points=1, hidden=False)
def within_a_quarter_bit(env):
    w = lab2.minilm_matrices()['encoder.layer.2.attention.self.key'][:64]
    lab2.check_best_block_size(feedback.given(env, 'best_block_size'), (w, 4.25), (w[:5], 4.6))
