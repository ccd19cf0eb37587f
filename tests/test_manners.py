"""The manners of the command line: what it is called, what it says of files and mistakes, what it leaves behind."""

import gc
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch

import nf4lab
from nf4lab.__main__ import main
from nf4lab.checkpoints import convert, partial


@pytest.fixture
def checkpoint(tmp_path):
    """A file with two matrices, an embedding and a bias."""
    torch.manual_seed(0)
    path = tmp_path / "in.safetensors"
    tensors = {"embed.weight": torch.randn(50, 64), "up.weight": torch.randn(96, 64), "up.bias": torch.randn(96)}
    safetensors.torch.save_file(tensors | {"down.weight": torch.randn(64, 96)}, path)
    return path


SCRIPT = "import sys\nfrom nf4lab.__main__ import main\nsys.exit(main())\n"


@pytest.mark.parametrize("how", ["module", "script"])
def test_the_version_does_not_wait_for_torch(tmp_path, how):
    (tmp_path / "nf4lab").write_text(SCRIPT)
    command = ["-m", "nf4lab"] if how == "module" else [tmp_path / "nf4lab"]
    done = subprocess.run([sys.executable, "-X", "importtime", *command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"nf4lab {nf4lab.__version__}\n")
    assert "torch" not in done.stderr  # the list of what was imported
    seconds = sum(
        int(line.split(":")[1].split("|")[0]) for line in done.stderr.splitlines() if "|" in line and "us" not in line
    )
    assert seconds < 500_000  # microseconds


def test_another_programs_version_is_its_own(tmp_path):
    (tmp_path / "other").write_text("import nf4lab\nprint('other 1.0')\n")
    done = subprocess.run([sys.executable, tmp_path / "other", "--version"], capture_output=True, text=True)
    assert done.stdout == "other 1.0\n"


def test_the_installed_command_is_the_same_program():
    import importlib.metadata

    found = importlib.metadata.entry_points(group="console_scripts", name="nf4lab")
    assert [entry.value for entry in found] == ["nf4lab.__main__:main"]


def test_a_program_that_calls_main_keeps_its_garbage_collection(tmp_path):
    before = gc.get_freeze_count()
    assert main(["inspect", str(tmp_path)]) == 1
    assert gc.get_freeze_count() == before


# --- files told by what they are

NOT_SAFETENSORS = {
    "zip": (b"PK\x03\x04" + b"\0" * 60, "a zip archive: PyTorch's pickle"),
    "pickle": (b"\x80\x04\x95" + b"." * 60, "a pickle, which can run code"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 60, "a GGUF file"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>" + b" " * 60, "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "a Git LFS pointer"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 60, "an HDF5 file"),
    "npy": (b"\x93NUMPY\x01\0" + b"\0" * 60, "a NumPy array"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 60, "a gzip archive"),
    "pdf": (b"%PDF-1.7\n" + b"\0" * 60, "it begins with b'%PDF-1.7"),
    "text": (b"Access to this model is restricted. " * 3, "it begins with b'Access to this m'"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + b"\0" * 60, "a 7z archive"),
    "xz": (b"\xfd7zXZ\0" + b"\1" * 60, "an xz archive"),
    "bzip2": (b"BZh91AY&SY" + b"\1" * 60, "a bzip2 archive"),
    "empty zip": (b"PK\x05\x06" + b"\0" * 18, "an empty zip archive"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 60, "a picture"),
    "jpeg": (b"\xff\xd8\xff\xe0" + b"\0" * 60, "a picture"),
    "html behind a mark": (b"\xef\xbb\xbf<!DOCTYPE html>" + b" " * 60, "a web page"),
    "json": (b'{"weight_map": {"a": "b.safetensors", "and": "so on"}}', "JSON"),
}


@pytest.mark.parametrize(("content", "words"), NOT_SAFETENSORS.values(), ids=NOT_SAFETENSORS)
def test_a_file_that_is_something_else_is_called_by_its_name(tmp_path, capsys, content, words):
    (tmp_path / "model.safetensors").write_bytes(content)
    for arguments in (["inspect"], ["compare"], ["quantize", str(tmp_path / "out")]):
        command, *more = arguments
        assert main([command, str(tmp_path / "model.safetensors"), *more]) == 1
        pattern = f"nf4lab: model.safetensors is not a safetensors file( but|:) {re.escape(words)}"
        assert re.search(pattern, capsys.readouterr().err)


def test_a_folder_of_pickles_names_them(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert main(["inspect", str(tmp_path)]) == 1
    assert (
        "holds neither model.safetensors.index.json nor model.safetensors; there are pytorch_model.bin"
        in capsys.readouterr().err
    )


# --- the command line


def test_a_pattern_takes_one_word_and_leaves_the_files_to_their_places(checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    assert main(["quantize", "--exclude", "*up*", str(checkpoint), str(out), "--quiet"]) == 0
    stored = nf4lab.load_quantized(out)
    assert [n for n, t in stored.items() if isinstance(t, nf4lab.QuantizedTensor)] == ["down.weight"]


def test_exclude_adds_to_what_stays_and_include_can_name_it(checkpoint, tmp_path):
    main(["quantize", str(checkpoint), str(tmp_path / "a"), "--exclude", "*down*", "--quiet"])
    main(["quantize", str(checkpoint), str(tmp_path / "b"), "--include", "*", "--include", "embed*", "--quiet"])
    found = [nf4lab.load_quantized(tmp_path / name).items() for name in "ab"]
    in_4_bits = [{n for n, t in stored if isinstance(t, nf4lab.QuantizedTensor)} for stored in found]
    assert in_4_bits == [{"up.weight"}, {"up.weight", "down.weight", "embed.weight"}]


def test_a_pattern_that_matches_nothing_is_status_1_and_nothing_is_written(checkpoint, tmp_path, capsys):
    assert main(["quantize", str(checkpoint), str(tmp_path / "out"), "--include", "*typo*", "--quiet"]) == 1
    assert "nf4lab: '*typo*' matches none of the 3 tensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_what_stays_and_its_share_are_listed_with_a_warning_over_half(checkpoint, tmp_path, capsys):
    assert main(["quantize", str(checkpoint), str(tmp_path / "a")]) == 0
    err = capsys.readouterr().err
    share = (50 * 64 + 96) / (50 * 64 + 96 + 2 * 96 * 64)
    assert f"left as they are, {share:.1%} of the weights:\n  embedding: embed.weight\n" in err and "warning" not in err
    tensors = {"embed.weight": torch.randn(500, 64), "up.weight": torch.randn(64, 64)}
    safetensors.torch.save_file(tensors, tmp_path / "most.safetensors")
    assert main(["quantize", str(tmp_path / "most.safetensors"), str(tmp_path / "b"), "--quiet"]) == 0
    assert "nf4lab: warning: 89% of the weights stay as they are: embed.weight (embedding)" in capsys.readouterr().err


def test_a_target_that_cannot_be_is_refused_by_the_name_that_was_given(checkpoint, tmp_path, capsys):
    assert main(["quantize", str(checkpoint), str(tmp_path / "no" / "out")]) == 1
    assert f"nf4lab: {tmp_path / 'no'} is not a folder to write out to" in capsys.readouterr().err
    for long in ("o" * 250, "o" * 300):  # with what hides it while it is written, both are too long
        assert main(["quantize", str(checkpoint), str(tmp_path / long), "--quiet"]) == 1
        assert capsys.readouterr().err.endswith(f"File name too long: '{tmp_path / long}'\n")
        assert main(["quantize", str(checkpoint), str(tmp_path / long), "--quiet", "--max-shard-size", "1GB"]) == 1
        assert capsys.readouterr().err.endswith(f"File name too long: '{tmp_path / long}'\n")
    assert main(["quantize", str(checkpoint), f"{tmp_path}/new/"]) == 1
    assert "names a folder, and IN is one file: name the file to write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_link_that_leads_nowhere_a_device_without_values_and_a_text_that_is_none_are_refused(
    checkpoint, tmp_path, capsys
):
    (tmp_path / "link").symlink_to("nowhere")
    wrong = {"link exists already": ["link"], "device 'meta' holds no values": ["out", "--device", "meta"],
             "in.safetensors is not text in UTF-8": ["out", "--calibrate", str(checkpoint)],
             "a size is a number": ["out", "--max-shard-size", "5G"]}  # fmt: skip
    for words, (out, *more) in wrong.items():
        assert main(["quantize", str(checkpoint), str(tmp_path / out), *more]) == 1
        assert words in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "out").exists()


def test_what_a_terminal_would_obey_is_written_out(tmp_path, capsys):
    evil = "\x1b[2J\x9b31m\u202e\r\n[bold]"
    tensors = {f"{evil}.weight": torch.randn(64, 64), f"embed{evil}.weight": torch.randn(64, 64)}
    path, out = tmp_path / "in.safetensors", tmp_path / f"out{evil}"
    safetensors.torch.save_file(tensors | {f"zero{evil}.weight": torch.zeros(64, 64)}, path)
    (tmp_path / f".{out.name}.0123abcd.partial").touch()
    assert main(["inspect", str(path)]) == main(["quantize", str(path), str(out)]) == 0
    assert main(["compare", str(path), "--bits", "4.5"]) == main(["inspect", str(tmp_path / f"no{evil}")]) - 1 == 0
    said = capsys.readouterr()
    assert "\\x1b[2J\\x9b31m\\u202e\\r\\n[bold].weight" in said.out and "embed\\x1b[2J" in said.err
    assert not set("\x1b\x9b\u202e") & set(said.out + said.err)


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(tmp_path):
    path = tmp_path / "in.safetensors"
    safetensors.torch.save_file({f"{k}.weight": torch.zeros(1) for k in range(5_000)}, path)
    for more in ([], ["--json"]):
        command = [sys.executable, "-m", "nf4lab", "inspect", path, *more]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        run.stdout.close()
        assert run.stderr.read() == b"" and run.wait() == 141


def in_a_shell(words, **environment):
    """A shell's line, in which nf4lab is the command; its output, and its status in the last line of that."""
    line = f"set -o pipefail; nf4lab() {{ '{sys.executable}' -m nf4lab \"$@\"; }}; {words}; echo $?"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize("end", ["2>&-", "2>/dev/full", "2>&1 >/dev/null | true", ">&-", "</dev/null >&- 2>&-"])
def test_what_can_not_be_told_ends_no_work(checkpoint, tmp_path, end):
    done = in_a_shell(f"nf4lab quantize {checkpoint} {tmp_path}/out {end}")
    assert done.stdout.splitlines()[-1] == "0" and done.stderr.count("Traceback") == 0
    assert isinstance(nf4lab.load_quantized(tmp_path / "out")["up.weight"], nf4lab.QuantizedTensor)


def test_where_only_the_report_fails_the_line_says_that_the_work_is_done(checkpoint, tmp_path):
    done = in_a_shell(f"nf4lab quantize {checkpoint} {tmp_path}/out --quiet >/dev/full")
    assert done.stdout == "1\n" and done.stderr.endswith(f"No space left on device; complete: {tmp_path}/out\n")


@pytest.mark.usefixtures("signals_of_a_terminal")
def test_a_signal_after_the_work_says_that_it_is_done(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nf4lab.commands.quantize.print", lambda *_: signal.raise_signal(signal.SIGTERM), raising=False)
    assert main(["quantize", str(checkpoint), str(tmp_path / "out"), "--quiet"]) == 143
    assert capsys.readouterr().err == f"nf4lab: stopped by SIGTERM; complete: {tmp_path / 'out'}\n"
    assert (tmp_path / "out").exists()


def test_a_comparison_whose_reader_left_has_written_its_files_all_the_same(checkpoint, tmp_path):
    files = f"--csv {tmp_path}/a.csv --plot {tmp_path}/a.png"
    done = in_a_shell(f"nf4lab compare {checkpoint} --bits 4.5 --include 'up*' --quiet {files} | true")
    assert (done.stdout, done.stderr) == ("141\n", "")
    assert (tmp_path / "a.csv").read_text().count("up.weight") > 10 and (tmp_path / "a.png").stat().st_size > 10_000


def test_a_table_that_can_not_be_written_leaves_no_part_of_it(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["compare", str(checkpoint), "--bits", "4.5", "--include", "up*", "--quiet"]
    monkeypatch.setattr(partial.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for option in ("--csv", "--plot"):
        assert main([*arguments, option, str(tmp_path / "a.png")]) == 1
        assert capsys.readouterr().err.endswith(f"No space left on device: '{tmp_path / 'a.png'}'\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_a_terminal_lacks_are_written_out(tmp_path, encoding):
    safetensors.torch.save_file({"日.weight": torch.randn(64, 64), "embed日": torch.zeros(9, 9)}, tmp_path / "in")
    for words in ("inspect in", "quantize in out日", "compare in --bits 4.5 --quiet"):
        done = in_a_shell(f"cd {tmp_path}; nf4lab {words}", PYTHONIOENCODING=encoding)
        assert done.stdout.splitlines()[-1] == "0", done.stderr
        assert ("\\u65e5" in done.stdout) == ("compare" not in words)


def test_a_reader_that_left_finds_the_file_that_was_written(tmp_path):
    safetensors.torch.save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "in.safetensors")
    command = [sys.executable, "-m", "nf4lab", "quantize", tmp_path / "in.safetensors", tmp_path / "out.safetensors"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    run.stdout.close()
    assert run.wait() == 141
    assert isinstance(nf4lab.load_quantized(tmp_path / "out.safetensors")["a.weight"], nf4lab.QuantizedTensor)


def test_inspect_and_compare_speak_json(checkpoint, tmp_path, capsys):
    main(["quantize", str(checkpoint), str(tmp_path / "out"), "--format", "int4", "--quiet"])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name["up.weight"]["stored_as"].startswith("int4, blocks of 64") and by_name["up.weight"]["shape"] == [
        96,
        64,
    ]
    assert found["bytes"] == sum(tensor["bytes"] for tensor in found["tensors"])
    arguments = ["compare", str(checkpoint), "--json", "--quiet", "--bits", "4.5", "--include", "up*"]
    assert main(arguments) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["weights"] == {"up.weight": 96 * 64}
    best = max(table["standings"], key=lambda row: row["budgets"].get("4.5", {"sqnr_db": 0})["sqnr_db"])
    assert best["budgets"]["4.5"]["won"] == 1


def test_no_error_at_all_is_null_in_json(tmp_path, capsys):
    safetensors.torch.save_file({"a.weight": torch.full((64, 64), 0.5)}, tmp_path / "in.safetensors")
    assert main(["compare", str(tmp_path / "in.safetensors"), "--json", "--quiet", "--bits", "4.5"]) == 0
    table = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {None} <= {row["budgets"]["4.5"]["sqnr_db"] for row in table["standings"] if row["budgets"]}


def test_an_empty_file_is_inspected_and_not_quantized(tmp_path, capsys):
    safetensors.torch.save_file({}, tmp_path / "empty.safetensors")
    assert main(["inspect", str(tmp_path / "empty.safetensors")]) == 0
    assert "0 tensors" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "empty.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tensors": [], "elements": 0, "bits": None, "bytes": 0}
    assert main(["quantize", str(tmp_path / "empty.safetensors"), str(tmp_path / "out")]) == 1
    assert "no tensor is chosen: of 0" in capsys.readouterr().err


def test_a_narrow_terminal_shows_names_to_their_ends(tmp_path, monkeypatch):
    names = [f"model.language_model.layers.{k}.self_attention.{part}_proj.weight" for k in (0, 31) for part in "qkvo"]
    safetensors.torch.save_file({name: torch.zeros(64, 64) for name in names}, tmp_path / "in.safetensors")
    code = "from rich.console import Console as C; import rich.console; "
    code += "rich.console.Console = lambda **k: C(**k | {'force_terminal': True, 'width': 80, 'color_system': None}); "
    code += f"from nf4lab.__main__ import main; main(['inspect', {str(tmp_path / 'in.safetensors')!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in done.stdout
    cells = "".join(line[: len(lines[0].split("stored as")[0]) - 1].strip() for line in lines[1:])
    assert all(name in cells for name in names), done.stdout + done.stderr


# --- what is left behind


def test_what_a_killed_run_left_is_named_by_the_next_and_removed_on_request(checkpoint, tmp_path, capsys):
    out, left = tmp_path / "out", tmp_path / ".out.0123abcd.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"x" * 1234)
    (tmp_path / ".out.not-ours.partial").write_text("precious")
    assert main(["quantize", str(checkpoint), str(out), "--quiet"]) == 0
    assert f"nf4lab: {left} (1,234 bytes): left by a run that was killed; --clean removes it" in capsys.readouterr().err
    assert left.exists()
    out.unlink()
    assert main(["quantize", str(checkpoint), str(out), "--quiet", "--clean"]) == 0
    assert "(1,234 bytes): removed" in capsys.readouterr().err
    assert not left.exists() and (tmp_path / ".out.not-ours.partial").exists()


def test_a_link_or_a_pipe_is_no_leftover(tmp_path):
    (tmp_path / "theirs").mkdir()
    for k, to in enumerate(("theirs", "nowhere")):
        (tmp_path / f".out.0123abc{k}.partial").symlink_to(to)
    os.mkfifo(tmp_path / ".out.0123abcd.partial")  # to open it would wait for ever
    assert partial.leftovers(tmp_path / "out") == {}


def test_a_comparison_that_can_not_keep_its_files_is_not_begun(checkpoint, tmp_path, capsys):
    (tmp_path / "link.png").symlink_to("nowhere")
    for words, outputs in {
        "both name": ["--csv", "a.png", "--plot", "a.png"],
        "exists already": ["--csv", "link.png"],
    }.items():
        arguments = [str(tmp_path / word) if word.endswith("png") else word for word in outputs]
        assert main(["compare", str(checkpoint), "--quiet", *arguments]) == 1
        said = capsys.readouterr()
        assert words in said.err and said.err.endswith("; nothing was compared\n") and not said.out


def test_what_another_run_is_writing_is_no_leftover(tmp_path):
    with partial.folder_appearing_whole(tmp_path / "out") as folder, partial.appearing_whole(tmp_path / "file") as file:
        file.write(b"x")
        assert folder.exists() and partial.leftovers(tmp_path / "out") == partial.leftovers(tmp_path / "file") == {}


@pytest.mark.skipif(not hasattr(os, "geteuid") or not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(path, mode):
        (tmp_path / "partial").touch()
        return open("/dev/full", "wb", buffering=0)

    monkeypatch.setattr(partial, "open", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.safetensors'"):
        nf4lab.save_quantized(tmp_path / "a.safetensors", {"a": torch.ones(100)})


def test_a_folder_in_which_a_worker_begins_a_file_while_it_is_removed_is_removed(tmp_path, monkeypatch):
    remove, calls = partial.shutil.rmtree, itertools.count()

    def slowly(path, **how):
        remove(path, **how)
        if next(calls) < 3:
            path.mkdir()
            (path / ".model.safetensors.0123abcd.partial").touch()

    monkeypatch.setattr(partial.shutil, "rmtree", slowly)
    with pytest.raises(KeyboardInterrupt), partial.folder_appearing_whole(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_file_that_appears_meanwhile_is_left_as_it_is(checkpoint, tmp_path, monkeypatch, capsys):
    out, write = tmp_path / "out", convert.quantize
    monkeypatch.setattr(convert, "quantize", lambda *a, **k: (out.write_text("precious"), write(*a, **k))[1])
    assert main(["quantize", str(checkpoint), str(out), "--quiet"]) == 1
    assert capsys.readouterr().err == f"nf4lab: {out} appeared while its content was made; it was left as it is\n"
    assert out.read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out"]


HALF_IMPORTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":  # the import that takes longest
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIG{name})
sys.meta_path.insert(0, Finder())
sys.orig_argv, sys.argv = [sys.executable, *sys.argv[1:]], sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import nf4lab
"""


@pytest.mark.parametrize("program", ["nf4lab", "/usr/bin/nf4lab"])
@pytest.mark.parametrize(
    ("name", "status", "words"),
    [("INT", 130, "interrupted"), ("TERM", 143, "stopped by SIGTERM"), ("HUP", 129, "stopped by SIGHUP")],
)
def test_a_signal_while_the_command_imports_is_one_line(program, name, status, words):
    command = [sys.executable, "-c", HALF_IMPORTED.replace("{name}", name), program, "inspect", "in.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, f"nf4lab: {words}; nothing was left behind\n")


def test_ctrl_c_while_another_program_imports_is_that_programs_own():
    code = HALF_IMPORTED.replace("{name}", "INT")
    done = subprocess.run([sys.executable, "-c", code, "other", "nf4lab"], capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr


RANDOM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background both are handed down as ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import nf4lab.checkpoints.convert as convert
from nf4lab.__main__ import main
write, calls, when = convert.quantize, [], int(sys.argv[1])
def slow(*arguments, **named):
    calls.append(1)
    if len(calls) == when:
        print("now", flush=True)
        sys.stdin.readline()
    return write(*arguments, **named)
convert.quantize = slow
sys.exit(main(["quantize", *sys.argv[2:], "--quiet", "--max-shard-size", "20KB"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_at_a_random_moment_loses_nothing_and_leaves_nothing_unsaid(tmp_path, number):
    rng = random.Random(number)
    source, out = tmp_path / "in.safetensors", tmp_path / "out"
    torch.manual_seed(0)
    safetensors.torch.save_file({f"{k}.weight": torch.randn(64, 64) for k in range(20)}, source)
    before = source.read_bytes()
    command = [sys.executable, "-c", RANDOM, str(rng.randint(1, 20)), source, out]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "now\n"
    run.send_signal(number)
    _, err = run.communicate("\n", timeout=60)
    assert source.read_bytes() == before and not out.exists()
    left = partial.leftovers(out)
    if number == signal.SIGKILL:
        assert run.returncode == -number and len(left) == 1
    else:
        assert run.returncode == 128 + number and err.count("\n") == 1 and not left
    assert main(["quantize", str(source), str(out), "--clean", "--quiet", "--max-shard-size", "20KB"]) == 0
    assert len(nf4lab.load_quantized(out)) == 20 and not partial.leftovers(out)


@pytest.mark.usefixtures("signals_of_a_terminal")
def test_a_second_signal_does_not_stop_the_removal_of_what_was_begun(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "in.safetensors", tmp_path / "out"
    safetensors.torch.save_file({f"{k}.weight": torch.randn(64, 64) for k in range(20)}, source)
    write, remove = convert.quantize, partial.shutil.rmtree
    for first, second in itertools.product((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), repeat=2):
        calls = itertools.count()

        def interrupted(*arguments, calls=calls, first=first, **named):
            if next(calls) == 12:
                signal.raise_signal(first)
            return write(*arguments, **named)

        def slow(path, *arguments, second=second, **named):
            signal.raise_signal(second)
            remove(path, *arguments, **named)

        monkeypatch.setattr(convert, "quantize", interrupted)
        monkeypatch.setattr(partial.shutil, "rmtree", slow)
        with warnings.catch_warnings():
            status = main(["quantize", str(source), str(out), "--quiet", "--max-shard-size", "9KB"])
        assert status == 128 + first and capsys.readouterr().err.endswith("nothing was left behind\n")
        assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
