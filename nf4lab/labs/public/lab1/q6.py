"""Made from labs/lab1/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab1
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q6"
points = None

@test_case(points=1, hidden=False)
def on_normal_weights(env):
    w = torch.randn(2 ** 14, generator=torch.Generator().manual_seed(6))
    lab1.check_best_tail(feedback.given(env, 'best_tail'), (0.85, 0.92, 0.9677083, 0.995), w, w ** 3, w.erf())
