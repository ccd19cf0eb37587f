"""Codes in bytes, and back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4lab.backends.cpu import repack
from nf4lab.formats.packing import WIDTHS, pack, packed_bytes, unpack

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


@settings(max_examples=200)
@given(st.sampled_from(WIDTHS), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_unpacking_gives_back_what_was_packed_at_every_width(bits, n, seed):
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, pad=1, bits=bits)
    assert packed.numel() == packed_bytes(n, bits) == math.ceil(n * bits / 8)
    assert torch.equal(unpack(packed, n, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_codes_are_one_stream_of_bits_with_the_first_code_foremost(bits):
    codes = torch.randint(0, 2**bits, (37,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    stream = "".join(f"{code:0{bits}b}" for code in [*codes.tolist(), *[1] * 8])[: 8 * packed_bytes(37, bits)]
    assert "".join(f"{byte:08b}" for byte in pack(codes, pad=1, bits=bits).tolist()) == stream


@pytest.mark.parametrize("n", [0, 1, 7, 8, 4096, 4099, 2**19 + 77])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("wanted", WIDTHS)
def test_repacking_is_unpacking_and_packing(bits, wanted, n):
    codes = torch.randint(0, 4, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(repack(pack(codes, 2, bits), n, bits, wanted, 3), pack(codes, 3, wanted))


def test_repacking_refuses_lengths_that_disagree():
    with pytest.raises(ValueError, match="9 codes of 3 and of 4 bits; got 3 and 5 bytes"):
        repack(torch.zeros(3, dtype=torch.uint8), 9, 3, 4)


def test_a_width_that_no_code_has_is_refused():
    with pytest.raises(ValueError, match=r"codes have 2, 3.* or 8 bits; got 9"):
        pack(torch.zeros(3, dtype=torch.uint8), bits=9)
    with pytest.raises(ValueError, match=r"3-bit codes lie in 0\.\.7; got 8"):
        pack(torch.tensor([8], dtype=torch.uint8), bits=3)
    with pytest.raises(ValueError, match="9 codes take 4 bytes; got 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 9, bits=3)
