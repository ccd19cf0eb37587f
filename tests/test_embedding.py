"""Embedding4bit: rows of a table in 4 bits, decoded alone and to the bit as the whole table decodes."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nf4lab

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
STORED = [(name, scheme) for name in nf4lab.FORMATS for scheme in (False, True, "linear4")]
STORED = [
    pytest.param(name, scheme, id=f"{name}-{scheme}")
    for name, scheme in STORED
    if not scheme or nf4lab.FORMATS[name].constants_dtype.itemsize > 1
]


def table(n=23, k=96, device="cpu", dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return nn.Embedding(n, k, device=device, dtype=dtype, **kwargs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("n", "k"), [(23, 128), (23, 96), (7, 50), (5, 1), (3, 200)]
)  # blocks of 32: whole, across rows
@pytest.mark.parametrize(("format", "double_quant"), STORED)
def test_rows_are_those_of_the_dequantized_table_to_the_bit(format, double_quant, n, k, device):
    for dtype in (torch.float32, torch.bfloat16):
        layer = nf4lab.Embedding4bit.from_embedding(table(n, k, device, dtype), format, 32, double_quant)
        ids = torch.tensor([[n - 1, 0, n // 2], [1, 1, n - 1]], device=device)
        expected = F.embedding(ids, layer.weight)
        assert torch.equal(layer(ids), expected) and layer(ids).dtype == dtype
        assert torch.equal(layer(ids.int()), expected)
        assert torch.equal(layer(ids[0, 0]), expected[0, 0])
        assert layer(ids[:, :0]).shape == (2, 0, k)


def test_the_table_is_never_decoded():
    """Of a table of 64 MB, three rows: what is allocated stays below one in a thousand of it."""
    layer = nf4lab.Embedding4bit(nf4lab.quantize(torch.zeros(2**16, 256), double_quant=True))
    ids = torch.tensor([5, 2**16 - 1, 77])
    layer(ids)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        layer(ids)
    sizes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes and max(sizes) < 64_000


def test_a_table_is_stored_saved_moved_and_copied_as_every_4_bit_layer():
    layer = nf4lab.Embedding4bit.from_embedding(table(padding_idx=3), "nf4", 32, True)
    ids = torch.arange(23)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    other = nf4lab.Embedding4bit.from_embedding(table(), "nf4", 32, True)
    other.packed.zero_()
    other.load_state_dict(torch.load(saved, weights_only=True))
    for same in (other, copy.deepcopy(layer), layer.to_embedding()):
        assert torch.equal(same(ids), layer(ids))
    assert layer.padding_idx == layer.to_embedding().padding_idx == 3
    assert sorted(layer.state_dict())[:2] == ["weight", "weight.absmax"]
    assert copy.deepcopy(layer).to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert list(layer.parameters()) == []
    assert "23, 96, nf4, block_size=32" in repr(layer)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_and_export_see_one_graph(device):
    layer = nf4lab.Embedding4bit.from_embedding(table(device=device), double_quant=True)
    ids = torch.tensor([[3, 22, 3]], device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(ids), layer(ids))
    assert torch.equal(torch.export.export(layer, (ids,)).module()(ids), layer(ids))
    torch.library.opcheck(torch.ops.nf4lab.lookup.default, (ids, layer.stored(), layer.layout, torch.bfloat16))


@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_looks_rows_up(in_dim):
    layer, ids = nf4lab.Embedding4bit.from_embedding(table(), double_quant=True), torch.tensor([[3, 22, 3], [0, 1, 2]])
    expected = layer(ids if in_dim == 0 else ids.T)
    assert torch.equal(torch.vmap(layer, in_dim)(ids), expected)
    stacked = torch.func.stack_module_state([layer, layer])
    both = torch.vmap(lambda state, ids: torch.func.functional_call(layer, state, ids))(stacked, ids)
    assert torch.equal(both, layer(ids))


class Scaled(nn.Embedding):
    """A table whose rows come scaled, as Gemma 3's."""

    def forward(self, ids):
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: nf4lab.Embedding4bit(torch.zeros(3, 4)), TypeError, "weight must be a QuantizedTensor; got Tensor"),
        (lambda: nf4lab.Embedding4bit(nf4lab.quantize(torch.zeros(4))), ValueError, r"embedding_dim\); got \(4,\)"),
        (lambda: nf4lab.Embedding4bit.from_embedding(nn.Linear(3, 4)), TypeError, "got Linear"),
        (lambda: nf4lab.Embedding4bit.from_embedding(Scaled(3, 4)), TypeError, "got Scaled"),
        (lambda: nf4lab.Embedding4bit.from_embedding(table(max_norm=1.0)), ValueError, "max_norm=1.0"),
        (lambda: nf4lab.Embedding4bit.from_embedding(nn.Embedding(3, 4, device="meta")), ValueError, "meta device"),
        (lambda: lookup([23]), IndexError, r"ids must be in 0..22; got 23 to 23"),
        (lambda: lookup([0, -1]), IndexError, r"got -1 to 0"),
        (lambda: lookup([0.5]), TypeError, "ids must be int32 or int64; got torch.float32"),
    ],
)
def test_mistakes_are_refused_by_name(make, error, match):
    with pytest.raises(error, match=match):
        make()


def lookup(ids):
    return nf4lab.Embedding4bit.from_embedding(table())(torch.tensor(ids))
