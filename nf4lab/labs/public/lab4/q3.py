"""Made from labs/lab4/master.md by `make labs`."""

import torch

import nf4lab
from nf4lab.labs import feedback, lab4
from nf4lab.labs.feedback import test_case

OK_FORMAT = False

name = "q3"
points = None

@test_case(points=1, hidden=False)
def with_odd_rests_and_idle_threads(env):
    cases = [(3, 640, 0), (640, 640, 40), (1, 1, 40), (63, 63, 40), (191, 191, 40)]
    lab4.check_body(feedback.given(env, 'dequantize_byte'), *cases)

@test_case(points=1, hidden=False)
def with_no_byte_read_twice(env):
    lab4.check_body_traffic(feedback.given(env, 'dequantize_byte'), 3)
