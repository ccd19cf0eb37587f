"""Files that lie: every mutation of a good safetensors file is refused in words, and none crashes the reader."""

import io
import json
import math
import os
import random

import pytest
import safetensors
import safetensors.torch
import torch

import nf4lab
from nf4lab.checkpoints import tensorfile


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file with d, double-quantized, p, with plain constants, i in min-max uniform, n in NVFP4, and an ordinary o."""
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    w = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    tensors = {"d": nf4lab.quantize(w, double_quant=True), "p": nf4lab.quantize(w), "o": w[0].clone()}
    tensors |= {"i": nf4lab.quantize(w, "uniform", double_quant=True), "n": nf4lab.quantize(w, "nvfp4")}
    nf4lab.save_quantized(path, tensors)
    return path


def parse(raw):
    """(header, data) of a file's bytes."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def build(header, data):
    """A file's bytes from a header, or its text, and data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_header(change):
    """A mutation that changes the parsed header in place."""

    def mutate(raw):
        header, data = parse(raw)
        change(header)
        return build(header, data)

    return mutate


def entry(**values):
    """A mutation of the header's entry for the tensor o."""
    return with_header(lambda header: header["o"].update(values))


def set_offsets(name, start, stop):
    return with_header(lambda h: h[name].update(data_offsets=[h[name]["data_offsets"][0] + start,
                                                              h[name]["data_offsets"][1] + stop]))  # fmt: skip


def pickled(raw):
    buffer = io.BytesIO()
    torch.save({"o": torch.ones(3)}, buffer)
    return buffer.getvalue()


def duplicate_name(raw):
    header, data = parse(raw)
    text = json.dumps(header)
    return build(text[:-1] + ', "o": ' + json.dumps(header["o"]) + "}", data)


BAD_HEADERS = {
    "empty": (lambda raw: b"", r"has 0 bytes; a safetensors file starts with the 8 bytes"),
    "seven bytes": (lambda raw: raw[:7], r"has 7 bytes"),
    "only the length": (lambda raw: raw[:8], r"announces a header of \d+ bytes; 0 follow: it is truncated"),
    "ends inside the header": (lambda raw: raw[:100], r"announces a header of \d+ bytes; 92 follow"),
    "ends inside the data": (lambda raw: raw[:-1], r"describes \d+ bytes of data; \d+ follow: it is truncated"),
    "bytes behind the data": (lambda raw: raw + b"\0", r"describes \d+ bytes of data; \d+ follow it"),
    "header of 2**63 bytes": (lambda raw: b"\xff" * 8 + raw[8:], r"announces a header of 18446744073709551615 bytes"),
    "header longer than the file": (lambda raw: (10**7).to_bytes(8, "little") + raw[8:], r"header of 10000000 bytes"),
    "header one byte shorter": (lambda raw: (int.from_bytes(raw[:8], "little") - 1).to_bytes(8, "little") + raw[8:],
                                r"the header describes|not JSON"),
    "header cut in half": (lambda raw: (200).to_bytes(8, "little") + raw[8:], r"the header is not JSON"),
    "not UTF-8": (lambda raw: raw[:9] + b"\xff" + raw[10:], r"the header is not JSON: 'utf-8' codec"),
    "half a character in a name": (lambda raw: raw.replace(b'"o"', b'"\\ud800"', 1), r"not JSON: .* surrogates"),
    "half a character in the metadata": (with_header(lambda h: h.update(__metadata__={"a": "\ud800"})),
        r"not JSON: .* surrogates"),
    "a list": (lambda raw: build("[]", b""), r"the header must be a JSON object; got a list"),
    "nested without end": (lambda raw: build("[" * 100_000, b""), r"the header is not JSON: maximum recursion depth"),
    "a file of torch.save": (pickled, r"is not a safetensors file but a zip archive: PyTorch.s pickle"),
    "one name twice": (duplicate_name, r"the name 'o' occurs twice"),
    "metadata that is a number": (with_header(lambda h: h.update(__metadata__={"a": 1})), r"map strings to strings"),
    "metadata null": (with_header(lambda h: h.update(__metadata__=None)), r"must map strings to strings; got None"),
    "an entry that is a list": (with_header(lambda h: h.update(o=[1])),
        r"'o' must have dtype, shape and data_offsets"),
    "no dtype": (with_header(lambda h: h["o"].pop("dtype")), r"'o' must have dtype, shape and data_offsets"),
    "one key more": (entry(x=1), r"'o' must have dtype, shape and data_offsets"),
    "unknown dtype": (entry(dtype="F31"), r"unknown dtype 'F31'; known are BOOL, U8"),
    "a dtype that is a list": (entry(dtype=["F32"]), r"unknown dtype \['F32'\]"),
    "another dtype": (entry(dtype="F64"),
                      r"F64 of shape \[100\] takes 800 bytes; its offsets span 400"),
    "a larger shape": (entry(shape=[101]), r"takes 404 bytes; its offsets span 400"),
    "a shape beyond 64 bits": (entry(shape=[2**62, 2**62]), r"its offsets span 400"),
    "a negative shape": (entry(shape=[-10, -10]), r"integers of at least 0; got \[-10"),
    "a shape of a float": (entry(shape=[100.0]), r"integers of at least 0; got \[100.0"),
    "a shape of true": (entry(shape=[True, 100]), r"at least 0; got \[True, 100\]"),
    "a shape that is a number": (entry(shape=100), r"at least 0; got 100"),
    "offsets the wrong way": (with_header(lambda h: h["o"]["data_offsets"].reverse()),
        r"a start and a stop after it"),
    "three offsets": (with_header(lambda h: h["o"]["data_offsets"].append(9)), r"a start and a stop after it"),
    "offsets that overlap": (set_offsets("o", -8, -8),
        r"'o' starts at byte \d+ and overlaps tensor '.*', which ends"),
    "offsets with a gap": (set_offsets("o", 8, 8), r"'o' starts at byte \d+ and leaves a gap behind tensor"),
    "a tensor left out": (with_header(lambda h: h.pop("d")), r"leaves a gap behind"),
    "the first does not start at 0": (set_offsets("d.nested_absmax", 4, 4), r"leaves a gap behind|overlaps"),
}  # fmt: skip


@pytest.mark.parametrize(("mutate", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_that_lies_is_refused_in_words(good, tmp_path, mutate, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(mutate(good.read_bytes()))
    with pytest.raises(ValueError, match=message) as refusal:
        nf4lab.load_quantized(path)
    assert "bad.safetensors" in str(refusal.value)


def with_state(key, change):
    """A mutation of the parts: the JSON under `key`, changed in place, or replaced by the text that comes back."""

    def mutate(parts):
        state = json.loads(bytes(parts[key].tolist()))
        text = change(state)
        text = (text if isinstance(text, str) else json.dumps(state)).encode()
        parts[key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return mutate


def state(key, **values):
    """A mutation of single values of a quant_state."""
    return with_state(key, lambda state: state.update(values))


def replaced(key, value):
    return lambda parts: parts.update({key: value(parts[key])})


def renamed(old, new):
    return lambda parts: parts.update({new: parts.pop(old)})


D, P, I = "d.quant_state.bitsandbytes__nf4", "p.quant_state.bitsandbytes__nf4", "i.quant_state.nf4lab"  # noqa: E741
BAD_STATES = {
    "no state": (lambda p: p.pop(D),
        r"there is 'd\.nested_absmax', and no quant_state for 'd'|no quant_state for 'd'"),
    "no packed bytes": (lambda p: p.pop("d"), r"a quant_state for 'd', and no tensor of that name"),
    "two states": (lambda p: p.update({"d.quant_state.bitsandbytes__fp4": p[D].clone()}), r"'d' has 2 quant_states"),
    "no absmax": (lambda p: p.pop("p.absmax"), r"'p': missing are \['\.absmax'\], unknown are none"),
    "no levels": (lambda p: p.pop("p.quant_map"), r"'p': missing are \['\.quant_map'\]"),
    "no nested absmax": (lambda p: p.pop("d.nested_absmax"), r"'d': missing are \['\.nested_absmax'\]"),
    "no nested levels": (lambda p: p.pop("d.nested_quant_map"), r"'d': missing are \['\.nested_quant_map'\]"),
    "no nested offset": (with_state(D, lambda s: s.pop("nested_offset") and None),
        r"missing are \['nested_offset'\]"),
    "no shape": (with_state(D, lambda s: s.pop("shape") and None), r"missing are \['shape'\]"),
    "a key more": (state(P, extra=1), r"missing are none, unknown are \['extra'\]"),
    "nested parts of a plain one": (lambda p: p.update({"p.nested_absmax": torch.ones(1)}),
        r"'p': missing are \['nest"),
    "nested codes in a plain one": (replaced("p.absmax", lambda t: t.to(torch.uint8)),
        r"absmax must be 32 torch.float"),
    "plain constants in a nested one": (replaced("d.absmax", lambda t: t.float()),
        r"must be 32 torch.uint8; got 32 tor"),
    "state not JSON": (with_state(P, lambda s: "{oops"), r"'p': the quant_state is not JSON"),
    "state a number": (with_state(P, lambda s: "7"), r"'p': the quant_state must be a JSON object; got 7"),
    "state nested without end": (with_state(P, lambda s: "[" * 100_000), r"the quant_state is not JSON: maximum rec"),
    "state in floats": (replaced(P, lambda t: t.float()), r"the quant_state is JSON in uint8; got torch.float32"),
    "one name twice": (with_state(P, lambda s: json.dumps(s)[:-1] + ', "shape": [1]}'),
        r"the name 'shape' occurs twice"),
    "a larger shape": (state(P, shape=[20, 101]), r"shape \(20, 101\) takes 1010 packed uint8"),
    "a shape of 2**70": (state(P, shape=[2**70]), r"absmax must be \d+ torch.float32; got 32"),
    "a negative shape": (state(P, shape=[-20, -100]), r"at least 0; got \[-20, -100\]"),
    "a shape of strings": (state(P, shape="20"), r"at least 0; got '20'"),
    "another block size": (state(P, blocksize=128), r"absmax must be 16 torch.float32; got 32"),
    "a block size of 48": (state(P, blocksize=48), r"blocksize must be one of 16, 32, .* got 48"),
    "a block size of 0": (state(P, blocksize=0), r"blocksize must be one of .* got 0"),
    "a block size in a string": (state(P, blocksize="64"), r"blocksize must be .* got '64'"),
    "unknown dtype": (state(P, dtype="int8"), r"dtype must be one of float32, .* got 'int8'"),
    "a dtype that is none": (state(P, dtype="load"), r"dtype must be one of .* got 'load'"),
    "another quant_type": (state(P, quant_type="fp4"), r"key says nf4, its quant_state says 'fp4'"),
    "another key": (renamed(P, "p.quant_state.bitsandbytes__fp4"), r"its key says fp4, its quant_state says 'nf4'"),
    "other levels": (replaced("p.quant_map", lambda t: t.flip(0)), r"the quant_map of nf4 is not the published one"),
    "15 levels": (replaced("p.quant_map", lambda t: t[1:].clone()),
        r"is not the published one; got 15 torch.float32"),
    "levels in float64": (replaced("p.quant_map", lambda t: t.double()), r"published one; got 16 torch.float64"),
    "other nested levels": (replaced("d.nested_quant_map", lambda t: t * 2),
        r"the nested_quant_map is not the published"),
    "nested dtype": (state(D, nested_dtype="float16"), r"nested_dtype must be float32; got 'flo"),
    "nested offset NaN": (state(D, nested_offset=math.nan), r"must be a finite number; got nan"),
    "nested offset null": (state(D, nested_offset=None), r"must be a finite number; got None"),
    "nested block size 0": (state(D, nested_blocksize=0), r"must be a positive integer; got 0"),
    "smaller groups": (state(D, nested_blocksize=8), r"groups of constants must be 4 .* got 1"),
    "absmax NaN": (replaced("p.absmax", lambda t: t * math.nan), r"absmax must be finite; 32 of 32 are not"),
    "absmax negative": (replaced("p.absmax", lambda t: -t), r"absmax must be at least 0; the least is -"),
    "one absmax fewer": (replaced("p.absmax", lambda t: t[1:].clone()), r"absmax must be 32 torch.float32; got 31"),
    "one byte fewer": (replaced("p", lambda t: t[1:].clone()), r"takes 1000 packed uint8; got 999"),
    "packed bytes as bool": (replaced("p", lambda t: t[:500].bool()), r"takes 1000 packed uint8; got 500"),
    "uniform: no scale": (lambda p: p.pop("i.scale"), r"'i': missing are \['\.scale'\]"),
    "uniform: no location": (lambda p: [p.pop(k) for k in list(p) if k.startswith("i.location")], r"'\.location'"),
    "uniform: no levels": (lambda p: p.pop("i.levels"), r"'i': format, constants_dtype or levels are missing"),
    "uniform: other levels": (replaced("i.levels", lambda t: t + 1),
        r"the levels of uniform is not the published one"),
    "uniform: unknown format": (state(I, format="nf5"), r"this version has no format 'nf5'"),
    "uniform: other constants": (state(I, constants_dtype="float16"), r"with constants in torch.f"),
    "uniform: unknown map": (with_state(I, lambda s: s["double_quant"].update(map="x")),
        r"unknown map 'x' for double"),
    "uniform: centred 1": (with_state(I, lambda s: s["double_quant"].update(centred="no")),
        r"centred must be true or false"),
    "nvfp4: no scale of the tensor": (lambda p: p.pop("n.tensor_scale"), r"'n': missing are \['\.tensor_scale'\]"),
    "nvfp4: two scales of the tensor": (replaced("n.tensor_scale", lambda t: t.repeat(2)),
        r"tensor_scale must be 1 torch.float32; got 2"),
    "nvfp4: scales in float32": (replaced("n.scale", lambda t: t.float()), r"scale must be 125 torch.float8_e4m3fn"),
    "uniform: unknown field": (state(I, normalize="min_max", fields={"x": 1}), r"unknown are \['x'\]"),
    "uniform: fields a list": (state(I, normalize="min_max", fields=[1]), r"fields must be a JSON object; got \[1\]"),
    "uniform: normalises as os": (state(I, normalize="system", fields={}), r"unknown normalisation 'system'"),
}  # fmt: skip


@pytest.mark.parametrize(("mutate", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_parts_that_contradict_each_other_are_refused_in_words(good, tmp_path, mutate, message):
    parts = safetensors.torch.load_file(good)
    mutate(parts)
    safetensors.torch.save_file(parts, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        nf4lab.load_quantized(tmp_path / "bad.safetensors")


def test_the_good_file_itself_is_read(good):
    assert sorted(nf4lab.load_quantized(good)) == ["d", "i", "n", "o", "p"]


def random_mutation(raw, rng):
    """One to three random bytes changed, removed or inserted, within the header most of the time."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) if rng.random() < 0.2 else 1500)
        kind = rng.randrange(3)
        raw[at : at + (kind != 2)] = b"" if kind == 1 else bytes([rng.choice(b'0123456789[]{},:"\0 \xffaF')])
    return bytes(raw)


def test_no_random_mutation_crashes_the_reader_or_passes_where_safetensors_refuses(good, tmp_path):
    rng, raw = random.Random(0), good.read_bytes()
    path, refused = tmp_path / "bad.safetensors", 0
    for _ in range(500):
        path.write_bytes(random_mutation(raw, rng))
        try:
            nf4lab.load_quantized(path)
        except ValueError:
            refused += 1
            continue
        with safetensors.safe_open(path, "pt") as file:  # what we read, the library reads too
            assert list(file.keys())
    assert refused > 400  # most mutations fall into the header


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match=r"pipe\.safetensors is a pipe or a device; a checkpoint is read from a file"):
        nf4lab.load_quantized(tmp_path / "pipe.safetensors")


def test_a_file_that_shrinks_after_it_was_opened_is_refused(good, tmp_path):
    path = tmp_path / "shrinking.safetensors"
    path.write_bytes(good.read_bytes())
    with tensorfile.TensorFile(path) as file:
        path.write_bytes(good.read_bytes()[:2000])
        with pytest.raises(ValueError, match="ends inside tensor 'o': it became shorter after it was opened"):
            file.read("o")


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.safetensors"
    nf4lab.save_quantized(path, {"a": torch.ones(3)})
    with pytest.raises(ValueError, match=r"a safetensors file cannot hold torch\.complex128"):
        nf4lab.save_quantized(path, {"a": torch.zeros(3, dtype=torch.complex128)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(nf4lab.load_quantized(path)["a"], torch.ones(3))
