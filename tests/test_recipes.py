"""The recipes of CONTRIBUTING.md, followed in a copy of the package: what they add appears everywhere by itself."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def house(tmp_path):
    """A copy of the package to change, with two methods: edit(file, old, new), and run(script) -> what it printed."""
    return House(tmp_path)


class House:
    def __init__(self, folder):
        self.folder, self.package = folder, folder / "nf4lab"
        # with what numba has compiled: it knows its files by time and size, and compiles what is edited anew
        left = shutil.ignore_patterns("*.pyc", "*.tmp.*", "public", "manuals-*")
        shutil.copytree(ROOT / "nf4lab", self.package, ignore=left)

    def edit(self, file, old, new):
        text = (self.folder / file).read_text()
        assert old in text, f"{file} has no {old!r} any more: CONTRIBUTING.md and this test say where to add"
        (self.folder / file).write_text(text.replace(old, new, 1))

    def run(self, script):
        where = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        head = "import torch, nf4lab; from nf4lab import backends, formats\n"
        head += f"assert nf4lab.__file__.startswith({str(self.folder)!r})\n"
        done = subprocess.run(
            [sys.executable, "-c", head + script], cwd=self.folder, env=where, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


EVERYWHERE = """
from nf4lab import explore, league, theory
from nf4lab.__main__ import main
x = torch.randn(2**17, generator=torch.Generator().manual_seed(1))
by_backend = [nf4lab.quantize(x, "mine", backend=name) for name in ("torch", "cpu")]
assert torch.equal(by_backend[0].packed, by_backend[1].packed) and torch.equal(by_backend[0].scale, by_backend[1].scale)
nf4lab.save_quantized("mine.safetensors", {"w": by_backend[0]})
back = nf4lab.load_quantized("mine.safetensors")["w"]
assert back.format == nf4lab.FORMATS["mine"] and torch.equal(back.dequantize(), by_backend[0].dequantize())
layer = nf4lab.Linear4bit.from_linear(torch.nn.Linear(64, 8), "mine")
layer.load_state_dict(layer.state_dict())
expected = theory.expected("mine").mse
assert abs(nf4lab.mse(x, by_backend[0].dequantize()) / expected - 1) < 0.02
assert "mine" in {one.name for one in league.entries()}
assert list(explore.errors(x[:2**13]))[-1] == "mine"
try:
    main(["quantize", "--help"])
except SystemExit:
    pass
"""
LAST_ROW = '    _row("iq4_nl", codebooks.iq4_nl, signed_absmax, torch.float16, extreme=-127, block_size=32),\n'


def test_a_row_of_the_table_is_a_format_everywhere(house):
    row = '    _row("mine", lambda: torch.linspace(-1, 1, 16)),\n'
    house.edit("nf4lab/formats/table.py", LAST_ROW, LAST_ROW + row)
    assert "mine" in house.run(EVERYWHERE)


def test_a_rule_and_its_row_are_a_normalisation_everywhere(house):
    house.edit(
        "nf4lab/formats/normalizations.py",
        "@dataclass(frozen=True)\nclass Normalization:",
        "def twice_absmax(blocks):\n    return 2 * blocks.abs().amax(dim=1), None\n\n\n"
        "@dataclass(frozen=True)\nclass Normalization:",
    )
    house.edit(
        "nf4lab/formats/normalizations.py",
        '        Normalization(absmax, depends_on="magnitude"),\n',
        '        Normalization(absmax, depends_on="magnitude"),\n'
        '        Normalization(twice_absmax, depends_on="magnitude"),\n',
    )
    row = '    _row("mine", lambda: torch.linspace(-0.5, 0.5, 16), twice_absmax),\n'
    house.edit("nf4lab/formats/table.py", LAST_ROW, LAST_ROW + row)
    house.edit("nf4lab/formats/table.py", "import absmax,", "import twice_absmax, absmax,")
    assert "mine" in house.run(EVERYWHERE)
    assert (
        house.run(
            """
own = nf4lab.Format("own", torch.linspace(-0.5, 0.5, 16), formats.NORMALIZATIONS["twice_absmax"].rule)
q = nf4lab.quantize(torch.randn(1000), own)
nf4lab.save_quantized("own.safetensors", {"w": q})
print(nf4lab.load_quantized("own.safetensors")["w"].format == own)
"""
        )
        == "True\n"
    )


def test_a_layer_on_what_is_stored_saves_copies_moves_and_pickles(house):
    (house.package / "layers" / "scale.py").write_text('''
from nf4lab.layers.stored import Stored4bit


class Scale4bit(Stored4bit):
    """x times a quantized vector."""

    def forward(self, x):
        return x * self.weight
''')
    assert (
        house.run(
            """
import copy, pickle
from nf4lab.layers.scale import Scale4bit
w, x = torch.randn(2, 100), torch.randn(3, 100)
layer, other = (Scale4bit(nf4lab.quantize(v, "nf4", double_quant=True)) for v in w)
y = layer(x)
assert torch.equal(y, x * nf4lab.quantize(w[0], "nf4", double_quant=True).dequantize())
assert "weight.quant_state.bitsandbytes__nf4" in layer.state_dict()
other.load_state_dict(layer.state_dict())
for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu")):
    assert torch.equal(twin(x), y)
assert layer.half()(x.half()).dtype == torch.float16 and layer.packed.dtype == torch.uint8
print("done")
"""
        )
        == "done\n"
    )


@pytest.mark.parametrize(("bits", "n_levels"), [(5, 32), (6, 50)])
def test_a_width_more_is_one_number(house, bits, n_levels):
    house.edit("nf4lab/formats/packing.py", "WIDTHS = (2, 3, 4, 8)", f"WIDTHS = (2, 3, 4, {bits}, 8)")
    assert (
        house.run(
            f"""
own, x = nf4lab.Format("own", torch.linspace(-1, 1, {n_levels})), torch.randn(4096 + 17)
q = nf4lab.quantize(x, own)
assert own.code_bits == {bits} and q.packed.numel() == -(-x.numel() * {bits} // 8)
expected = (x[:, None] / q.absmax.repeat_interleave(64)[: len(x), None] - own.levels).abs().argmin(dim=1)
assert torch.equal(q.codes.long(), expected)
nf4lab.save_quantized("own.safetensors", {{"w": q}})
assert torch.equal(nf4lab.load_quantized("own.safetensors")["w"].dequantize(), q.dequantize())
print("done")
"""
        )
        == "done\n"
    )


QUESTION = '''
## Question 7. Halves (2 points)

```{code-cell} ipython3
:tags: [q7]
def halved(w):
    """Half of each weight."""
    # BEGIN SOLUTION
    half_of_each = 0.5 * w
    return half_of_each
    # END SOLUTION
```

```{code-cell} ipython3
:tags: [q7, public, 1-point]
def of_ones(env):
    lab1.check_halved(feedback.given(env, "halved"), torch.ones(3))
```

```{code-cell} ipython3
:tags: [q7, hidden, 1-point]
def of_draws(env):
    w = torch.randn(20, generator=torch.Generator().manual_seed(SEED))
    lab1.check_halved(feedback.given(env, "halved"), w)
```

## Hand in
'''
COMPARED = '''

def check_halved(f, w: Tensor) -> None:
    """Half of each weight."""
    causes = {"these are twice the weights": 2 * w}
    feedback.close(feedback.call(f, w, others=OTHERS), w / 2, "halved(w)", FLOAT32, causes)
'''
MISTAKE = """
MISTAKES["twice"] = "def halved(w):\\n    return 2 * w", 2, "Likely cause: these are twice the weights"
"""
MADE = """
import sys, zipfile
from pathlib import Path
sys.path[:0] = ["labs", "tests"]
import make_labs, pytest, test_labs
assert make_labs.make("lab1", 2026) == ["labs/lab1/lab1.ipynb", "nf4lab/labs/public/lab1/q7.py"]
given = Path("labs/lab1/lab1.ipynb").read_text()
assert "Half of each weight" in given and "half_of_each" not in given
assert "of_draws" in zipfile.ZipFile("_build/labs/lab1.zip").read("tests/q7.py").decode()
test_labs.test_the_master_earns_all_points_with_any_seed("lab1", 1)
test_labs.test_a_likely_mistake_loses_its_points_and_is_named("lab1", "twice")
test_labs.test_nothing_of_a_solution_or_a_hidden_check_is_in_a_students_file("lab1")
test_labs.test_only_lab_4_asks_for_a_gpu_and_every_lab_has_its_button_and_setup("lab1")
guide = Path("labs/README.md")
with pytest.raises(AssertionError):
    test_labs.test_the_guide_tells_the_labs_minutes_and_points()
guide.write_text(guide.read_text().replace("| 1 Levels | 75 | 20 |", "| 1 Levels | 75 | 22 |"))
test_labs.test_the_guide_tells_the_labs_minutes_and_points()
print("done")
"""


def test_a_question_is_handed_out_checked_and_graded_and_the_guide_is_asked_for_its_points(house):
    pytest.importorskip("lab_submissions", reason="a copy for students has no masters")
    others = shutil.ignore_patterns("lab[2-9]", "seed", "__pycache__")
    for name in ("labs", "tests/mistakes", "nf4lab/labs/public/lab1"):
        shutil.copytree(ROOT / name, house.folder / name, ignore=others)
    (house.folder / "book").mkdir()
    tests = [f"tests/{name}.py" for name in ("masters", "lab_submissions", "test_labs")]
    for name in ("_config.yml", "book/make_notebooks.py", *tests):
        shutil.copy(ROOT / name, house.folder / name)
    house.edit("labs/lab1/master.md", "\n## Hand in\n", QUESTION)
    house.edit("labs/lab1/master.md", "**Points** 20, in six questions", "**Points** 22, in seven questions")
    for name, more in (("nf4lab/labs/lab1.py", COMPARED), ("tests/mistakes/lab1.py", MISTAKE)):
        (house.folder / name).write_text((house.folder / name).read_text() + more)
    assert house.run(MADE).endswith("done\n")


def test_every_file_and_command_that_the_recipes_name_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:nf4lab|labs|book|tests|benchmarks)/[\w./-]+|[.\w-]+\.(?:md|yml|yaml))`", text))
    made_up = {"book/NN-name.md", "labs/labN/master.md", "nf4lab/labs/labN.py"}
    assert not {name for name in named - made_up if not (ROOT / name).exists()}
    tests = set(re.findall(r"\btest_\w+\.py", text))
    assert not {name for name in tests if not (ROOT / "tests" / name).exists()}
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets


def test_the_hook_before_a_commit_runs_the_ruff_that_is_pinned():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={repo['rev'].removeprefix('v')}\n" in (ROOT / "requirements.txt").read_text()
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        yaml.safe_load(path.read_text())
