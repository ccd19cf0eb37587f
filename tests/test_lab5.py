"""Lab 5: an answer that others build on costs no points there, and its ship's log."""

import masters
import pytest
import torch
from lab_submissions import changed

pytest.importorskip("glassllm")
lab5 = pytest.importorskip("nf4lab.labs.lab5", exc_type=ImportError)


def test_a_wrong_function_costs_nothing_in_the_layer_that_calls_it():
    """A stand-in takes its place there; only the run of all parts together feels it."""
    notebook = changed("lab5", "q2", {"grad.dtype), None": "grad.dtype).T, None", "x.dtype).T": "x.dtype).T + 1"})
    assert masters.outcome("lab5", masters.run(notebook), ["q2", "q3"])[0] == 4


def test_the_log_differs_by_seed_and_batches_keep_the_order():
    assert lab5.ships_log(1, 5) == lab5.ships_log(1, 5) != lab5.ships_log(2, 5)

    class Letters:
        def encode(self, text):
            return [ord(c) for c in text]

    text = lab5.ships_log(1, 50)
    data = lab5.batches(Letters(), text, rows=3, length=9)
    assert data.shape[1:] == (3, 10) and "".join(map(chr, data.flatten().tolist())) == text[: data.numel()]
    assert data.dtype == torch.int64


def test_in_bfloat16_the_next_number_passes_and_the_one_after_it_does_not():
    compare, one = lab5._close_in(torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    step = torch.finfo(torch.bfloat16).eps
    assert step == 2**-7
    compare(one + step, one, "y", {})
    with pytest.raises(lab5.feedback.Mistake, match=r"expected 1, got 1\.015625"):
        compare(one + 2 * step, one, "y", {})


def test_in_the_llama_of_7_billion_the_embedding_and_what_trains_are_the_shares_that_the_text_names():
    width, inner, words, rank = 4096, 11008, 32_000, 8
    linear = 32 * (4 * width * width + 3 * width * inner) + words * width  # the head is a layer of its own there
    embedding = 4 * words * width
    frozen = linear * 4.5 / 8 + embedding
    trained = 16 * rank * (32 * (4 * 2 * width + 3 * (width + inner)) + words + width)
    assert round(frozen / embedding) == 8
    assert 0.05 < trained / (trained + frozen) < 0.1
