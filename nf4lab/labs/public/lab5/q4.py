"""Made from labs/lab5/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab5
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q4"
points = None

@test_case(points=2, hidden=False)
def on_a_plain_layer(env):
    lab5.check_lora(feedback.given(env, 'LoRA'), 4)
