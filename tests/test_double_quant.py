"""Constants quantized: what is stored, what comes back, what it costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nf4lab
from nf4lab import backends
from nf4lab.formats import double_quant
from nf4lab.formats.double_quant import MAPS

SCHEMES = [nf4lab.DoubleQuant(map, centred) for map in MAPS for centred in (True, False)]


def absmaxes(n, seed=0):
    """Absmax of n blocks of 64 normal weights: float32 (n,)."""
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(seed)).abs().amax(dim=1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n", [0, 1, 2, 255, 256, 257, 1000])
def test_any_number_of_constants_comes_back(scheme, n):
    constants = absmaxes(n)
    stored = scheme.quantize(constants)
    decoded = stored.dequantize()
    assert decoded.shape == constants.shape
    assert stored.group_absmax.numel() == -(-n // 256)
    half_gap = MAPS[scheme.map].levels.diff().max().item() / 2
    bound = stored.group_absmax.repeat_interleave(256)[:n] * half_gap
    assert ((decoded - constants).abs() <= bound * (1 + 2**-20) + 2**-20).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_counted_as_they_are_stored(scheme):
    stored = scheme.quantize(absmaxes(512))
    code_bytes = 512 if MAPS[scheme.map].code_bits == 8 else 256
    assert stored.nbytes == code_bytes + 2 * 4 + (4 if scheme.centred else 0)


def test_nf4_double_quantized_takes_4_127_bits_a_weight():
    q = nf4lab.quantize(torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)), double_quant=True)
    by_hand = 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2  # codes, their constants, the groups', one offset
    assert q.bits_per_weight == pytest.approx(by_hand, rel=1e-12)
    assert round(q.bits_per_weight, 5) == 4.12696


def test_the_codes_of_the_weights_do_not_change():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    plain = nf4lab.quantize(x)
    for scheme in SCHEMES:
        assert torch.equal(nf4lab.quantize(x, double_quant=scheme).packed, plain.packed)


@given(n=st.integers(1, 600), seed=st.integers(0, 1000))
def test_second_level_codes_are_the_nearest_of_the_map(n, seed):
    constants = absmaxes(n, seed)
    stored = nf4lab.DoubleQuant().quantize(constants)
    scale = stored.group_absmax.double().repeat_interleave(256)[:n, None]
    distance = ((constants - stored.offset).double()[:, None] - MAPS["dynamic8"].levels.double() * scale).abs()
    chosen = distance.gather(1, stored.codes.long()[:, None]).squeeze(1)
    assert (chosen <= distance.amin(dim=1) + 2**-22 * scale.squeeze(1)).all()  # but for rounding next to a midpoint


def test_the_dynamic_map_costs_what_was_measured_for_it():
    constants = absmaxes(2**16)
    relative = (nf4lab.DoubleQuant().quantize(constants).dequantize() - constants).abs() / constants
    assert relative.mean().item() == pytest.approx(0.0016, rel=0.1)


def test_centring_pays_for_every_map():
    constants = absmaxes(2**14)
    for map in MAPS:
        centred, not_centred = (
            nf4lab.mse(constants, nf4lab.DoubleQuant(map, c).quantize(constants).dequantize()) for c in (True, False)
        )
        assert centred < not_centred


@pytest.mark.parametrize("format", ["uniform", "naive-quantile"])
def test_both_constants_of_a_shifted_format_are_quantized(format):
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    q = nf4lab.quantize(x, format, double_quant="linear8")
    assert q.bits_per_weight == pytest.approx(4 + 2 * (8 / 64 + 32 / (64 * 256) + 32 / 2**16))
    plain = nf4lab.quantize(x, format)
    assert nf4lab.mse(x, q.dequantize()) == pytest.approx(nf4lab.mse(x, plain.dequantize()), rel=0.02)


def stored_by(scheme, constants):
    """The tensors that quantized constants are stored in."""
    stored = scheme.quantize(constants)
    return stored.codes, stored.group_absmax, stored.offset, stored.dequantize()


@pytest.mark.parametrize("n", [2**15 - 1, 2**15, 40_000, 2**17 + 3])
def test_any_number_of_threads_gives_the_same_bits(n):
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads] = [stored_by(nf4lab.DoubleQuant(), absmaxes(n, seed)) for seed in range(4)]
    finally:
        torch.set_num_threads(before)
    for others in (found[2], found[3]):
        assert all(torch.equal(a, b) for one, other in zip(found[1], others, strict=True)
                   for a, b in zip(one, other, strict=True))  # fmt: skip


@pytest.mark.parametrize("n", [1, 255, 1000, 2**15 - 1])
def test_the_offset_is_torchs_mean_as_bitsandbytes_takes_it(n):
    assert torch.equal(nf4lab.DoubleQuant().quantize(absmaxes(n)).offset, absmaxes(n).mean())


@pytest.mark.parametrize("towards", [torch.inf, -torch.inf])
def test_another_last_bit_of_the_mean_moves_few_codes_and_none_by_more_than_one(monkeypatch, towards):
    constants = absmaxes(2**17)
    codes, *_ = stored_by(nf4lab.DoubleQuant(), constants)
    mean = constants.double().mean().float().nextafter(torch.tensor(towards))
    monkeypatch.setattr(double_quant, "mean", lambda constants: mean)
    others, *_ = stored_by(nf4lab.DoubleQuant(), constants)
    apart = (codes.int() - others.int()).abs()
    assert 0 < apart.count_nonzero() < 2**17 / 10_000 and apart.max() == 1


def test_true_is_the_scheme_of_bitsandbytes_and_a_name_is_a_map():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert nf4lab.quantize(x, double_quant=True).stored_scale.double_quant == nf4lab.DoubleQuant("dynamic8", True, 256)
    assert nf4lab.quantize(x, double_quant="linear4").stored_scale.double_quant == nf4lab.DoubleQuant("linear4")


def test_an_unknown_map_or_group_size_or_type_is_refused():
    with pytest.raises(ValueError, match=r"unknown map 'fp8'.*known are dynamic8, linear8, linear4"):
        nf4lab.quantize(torch.zeros(4), double_quant="fp8")
    with pytest.raises(ValueError, match="group_size must be a positive integer; got 0"):
        nf4lab.DoubleQuant(group_size=0)
    with pytest.raises(TypeError, match=r"double_quant must be a bool, a map's name or .*; got int"):
        nf4lab.quantize(torch.zeros(4), double_quant=8)


@pytest.mark.parametrize("map", MAPS)
def test_quantizing_constants_looks_at_none_of_them_so_that_a_gpu_need_not_be_waited_for(map):
    constants = torch.empty(1000, device="meta")  # whoever asks for a value there gets an error
    quantized = nf4lab.DoubleQuant(map).quantize(constants)
    assert quantized.codes.is_meta and quantized.dequantize().shape == (1000,)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("group_size", [1, 100, 256, 4099])
@pytest.mark.parametrize("n", [1, 257, 5000])
def test_the_kernel_for_constants_makes_the_bytes_of_the_reference(map, group_size, n):
    scheme = nf4lab.DoubleQuant(map, n != 257, group_size)
    signs = 1.0 - 2 * (torch.arange(n) % 3 == 0)  # locations have both signs
    for constants in (absmaxes(n), signs * absmaxes(n), torch.ones(n), absmaxes(n) * 1e-40, absmaxes(n) * 1e38):
        one, other = scheme.quantize(constants), scheme.quantize(constants, backends.ENCODE_CONSTANTS["cpu"])
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.group_absmax.view(torch.int32), other.group_absmax.view(torch.int32))
