"""Made from labs/lab3/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab3
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q6"
points = None

@test_case(points=1, hidden=False)
def on_one_matrix(env):
    w = lab3.minilm_matrices()['encoder.layer.2.attention.self.key']
    lab3.check_beat(feedback.given(env, 'beat_the_default'), 0.999, w)
