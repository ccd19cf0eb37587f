"""Beyond rounding to nearest: rotate, correct, learn.

calibration   what each layer of a model is given: the second moments of its inputs
rotation      the fast Walsh-Hadamard transform with random signs, and a layer that rotates its input
folding       the same folded into a whole language model, with nothing left to run
scaling       columns scaled by what they are given
learning      levels and words made for one layer, or for each row
language_models  a language model's folder rotated, corrected and quantized

Error feedback itself is `nf4lab.quantize(…, hessian=…)`: see `nf4lab.backends.feedback`. Adapters that start where the
error is: `nf4lab.layers.starts`.
"""
