"""The command line, in processes of its own: what it prints, what it refuses, what memory it takes, and a kill."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import nf4lab
from nf4lab.__main__ import COMMANDS, main
from nf4lab.checkpoints.tensorfile import TensorFile

MIB = 2**20


def run(*arguments, code=None):
    """`python -m nf4lab …`, or the code, in a process of its own."""
    command = ["-c", code] if code else ["-m", "nf4lab"]
    return subprocess.run([sys.executable, *command, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def checkpoint(tmp_path):
    """A file with two matrices to quantize, an embedding, and a bias."""
    torch.manual_seed(0)
    path = tmp_path / "in.safetensors"
    tensors = {"embed.weight": torch.randn(50, 64), "up.weight": torch.randn(96, 64), "up.bias": torch.randn(96)}
    safetensors.torch.save_file(tensors | {"down.weight": torch.randn(64, 96).bfloat16()}, path)
    return path


def test_quantize_writes_a_file_and_says_how_small_it_became(checkpoint, tmp_path):
    done = run("quantize", checkpoint, tmp_path / "out.safetensors", "--format", "nf4", "--double-quant")
    assert done.returncode == 0, done.stderr
    before = sum(t.nbytes for t in safetensors.torch.load_file(checkpoint).values())
    after = sum(t.nbytes for t in safetensors.torch.load_file(tmp_path / "out.safetensors").values())
    sizes = f"2 of 4 tensors quantized; {before:,} bytes became {after:,} ({after / before:.1%})"
    assert done.stdout == f"{tmp_path / 'out.safetensors'}: {sizes}\n"
    assert "quantize: 100%" in done.stderr  # the bar
    back = nf4lab.load_quantized(tmp_path / "out.safetensors")
    expected = nf4lab.quantize(safetensors.torch.load_file(checkpoint)["down.weight"], double_quant=True)
    assert torch.equal(back["down.weight"].dequantize(), expected.dequantize())
    assert back["down.weight"].dtype == torch.bfloat16


def test_inspect_lists_every_tensor_with_its_format_shape_bits_and_bytes(checkpoint, tmp_path, capsys):
    assert main(["quantize", str(checkpoint), str(tmp_path / "out.safetensors"), "--quiet", "--format", "int4"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out.safetensors")]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "int4, blocks of 64, from bfloat16" in lines["down.weight"] and "64 x 96" in lines["down.weight"]
    assert "float32" in lines["embed.weight"] and lines["embed.weight"].split()[-2:] == ["32.000", "12,800"]
    data = sum(t.nbytes for t in safetensors.torch.load_file(tmp_path / "out.safetensors").values())
    assert lines["4"].split()[1] == "tensors" and lines["4"].split()[-1] == f"{data:,}"


def test_inspect_reads_headers_and_not_tensors(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(TensorFile, "read", lambda self, name: pytest.fail(f"{name} was read"))
    assert main(["inspect", str(checkpoint)]) == 0
    assert "up.weight" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_a_bad_file_is_one_line_on_stderr_and_status_1(tmp_path, capsys, command):
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    target = [str(tmp_path / "out.safetensors")] if command == "quantize" else []
    assert main([command, str(tmp_path / "bad.safetensors"), *target]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nf4lab: bad.safetensors announces a header of") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing.safetensors")]) == 1
    assert "nothing.safetensors" in capsys.readouterr().err


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", "a", "b", "--format", "nf5"])
    assert "invalid choice: 'nf5' (choose from" in capsys.readouterr().err


def test_every_command_helps(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([command.__name__.rpartition(".")[2], "--help"])
        assert "usage: nf4lab" in capsys.readouterr().out


KILLED = """
import os, signal, sys
import nf4lab.checkpoints.convert
quantize, calls = nf4lab.checkpoints.convert.quantize, []
def killing(*arguments, **named):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.{signal})
    return quantize(*arguments, **named)
nf4lab.checkpoints.convert.quantize = killing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start deaf to it
from nf4lab.__main__ import main
sys.exit(main(["quantize", *sys.argv[1:], "--quiet"]))
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_run_leaves_no_file_under_the_final_name_and_the_next_run_succeeds(checkpoint, tmp_path, kind):
    source, target = checkpoint, tmp_path / "out.safetensors"
    if kind == "folder":
        source, target = tmp_path / "model", tmp_path / "out"
        source.mkdir()
        checkpoint.rename(source / "model.safetensors")
    done = run(source, target, code=KILLED.format(signal="SIGKILL"))
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert [path.suffix for path in tmp_path.iterdir() if path.name.startswith(".out")] == [".partial"]
    assert main(["quantize", str(source), str(target), "--quiet"]) == 0
    assert isinstance(nf4lab.load_quantized(target)["down.weight"], nf4lab.QuantizedTensor)


@pytest.mark.usefixtures("signals_of_a_terminal")
@pytest.mark.parametrize(
    ("signal", "status", "words"),
    [
        ("SIGINT", 130, "interrupted"),
        ("SIGTERM", 143, "stopped by SIGTERM"),
        ("SIGHUP", 129, "stopped by SIGHUP"),
    ],
)
def test_an_interrupted_run_says_so_in_a_line_and_removes_what_it_had_written(
    checkpoint, tmp_path, signal, status, words
):
    done = run(checkpoint, tmp_path / "out.safetensors", code=KILLED.format(signal=signal))
    assert (done.returncode, done.stderr) == (status, f"nf4lab: {words}; nothing was left behind\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


MEASURED = """
import sys
from pathlib import Path
import torch, nf4lab
from nf4lab.__main__ import main

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

def whole(source, target):
    tensors = nf4lab.load_quantized(source)
    nf4lab.save_quantized(target, {name: nf4lab.quantize(w, double_quant=True) for name, w in tensors.items()})

def stream(source, target):
    assert main(["quantize", source, target, "--double-quant", "--quiet"]) == 0

small, source, target = sys.argv[1:]
stream(small, target + "0")  # imports what is imported late, and compiles the kernel
for work in (stream, whole):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    work(source, target + work.__name__)
    print("peak", status("VmHWM") - before)
"""


def can_reset_the_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not can_reset_the_peak(), reason="/proc/self/clear_refs, which resets the peak, can't be written")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_it_takes_is_bounded_by_the_largest_tensor(tmp_path, dtype):
    largest = 32 * MIB
    rows = largest // dtype.itemsize // 1024
    tensors = {f"{i}.weight": torch.zeros(n, 1024, dtype=dtype) for i, n in enumerate((rows, rows // 2, rows, rows))}
    safetensors.torch.save_file(tensors, tmp_path / "in")
    safetensors.torch.save_file({"0.weight": torch.zeros(rows // 16, 1024, dtype=dtype)}, tmp_path / "small")
    done = run(tmp_path / "small", tmp_path / "in", tmp_path / "out", code=MEASURED)
    assert done.returncode == 0, done.stderr
    stream, whole = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak"))
    # For each weight its own 16 or 32 bits, 4.2 of its codes and constants, about 4 while the constants are quantized,
    # and what the allocator keeps: under 16 bits beside the tensor.
    assert stream < (1 + 16 / (8 * dtype.itemsize)) * largest
    assert whole > 3 * largest  # the measure sees what it should: all tensors together are 3.5 of the largest
