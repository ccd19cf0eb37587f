"""Two codes a byte, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf4lab.formats.packing import pack, unpack

codes_lists = st.lists(st.integers(0, 15), max_size=257)


@given(codes_lists)
def test_unpacking_inverts_packing(codes):
    codes = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes), len(codes)), codes)


@given(st.binary(max_size=129))
def test_packing_inverts_unpacking(data):
    packed = torch.tensor(list(data), dtype=torch.uint8)
    assert torch.equal(pack(unpack(packed, 2 * len(data))), packed)


def test_the_even_element_takes_the_high_nibble():
    assert pack(torch.tensor([0xA, 0x3], dtype=torch.uint8)).item() == 0xA3


def test_an_odd_length_is_completed_with_the_pad_code():
    assert pack(torch.tensor([0xA], dtype=torch.uint8), pad=7).item() == 0xA7


def test_a_code_above_fifteen_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.15; got 16"):
        pack(torch.tensor([3, 16], dtype=torch.uint8))


def test_codes_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"uint8; got torch\.int64"):
        pack(torch.tensor([3]))
    with pytest.raises(TypeError, match=r"uint8; got torch\.int64"):
        unpack(torch.tensor([3]), 2)


@pytest.mark.parametrize(("n", "n_bytes"), [(3, 1), (3, 3), (0, 1)])
def test_a_length_that_does_not_fit_the_bytes_is_refused(n, n_bytes):
    with pytest.raises(ValueError, match=f"{n} codes take {(n + 1) // 2} bytes; got {n_bytes}"):
        unpack(torch.zeros(n_bytes, dtype=torch.uint8), n)
