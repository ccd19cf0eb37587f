"""The house: pins and ranges agree, nothing that is made is stored, arrows between rooms point down."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from walks import walk

import nf4lab
from nf4lab.kernels.cuda import ptx, simulated

ROOT = Path(__file__).resolve().parents[1]


def pins():
    """Name and version of every pin that applies on this system."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pinned)
    return {pin.name: str(pin.specifier)[2:] for pin in pinned if pin.marker is None or pin.marker.evaluate()}


def test_every_pin_lies_in_the_range_that_the_package_accepts():
    pinned = pins()
    for requirement in map(
        Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_the_environment_has_the_pinned_versions():
    different = {
        name: (version, found)
        for name, version in pins().items()
        if (found := importlib.metadata.version(name).split("+")[0]) != version
    }
    assert not different


@pytest.mark.parametrize(
    ("name", "version"), {"numba": "0.61.2", "numpy": "2.1.3", "scipy": "1.16.3", "matplotlib": "3.10.0"}.items()
)
def test_what_colab_has_lies_in_the_range_too(name, version):
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    accepted = {requirement.name: requirement.specifier for requirement in map(Requirement, dependencies)}
    assert accepted[name].contains(version)


def test_no_notebook_stores_outputs():
    listed = subprocess.run(["git", "ls-files", "*.ipynb"], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in listed.stdout.split():
        cells = [c for c in json.loads((ROOT / path).read_text())["cells"] if c["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), path


def imported():
    """{module: what it imports of the package when it is loaded}; the package's own front is left out."""
    found = {}
    for path in sorted((ROOT / "nf4lab").rglob("*.py")):
        if "public" in path.parts or path == ROOT / "nf4lab" / "__init__.py":
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        imports = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imports |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imports |= {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = {target for target in imports if target.startswith("nf4lab.")}
    return found


def arrows():
    """{room: the rooms that it uses}: a room is a folder or a single file of the package."""
    uses = {}
    for name, targets in imported().items():
        room = name.split(".")[1]
        uses.setdefault(room, set()).update({target.split(".")[1] for target in targets} - {room})
    return {room: used & set(uses) for room, used in uses.items()}


def test_arrows_between_rooms_make_no_circle():
    TopologicalSorter(arrows()).prepare()  # raises CycleError, which names the circle


def test_the_rooms_at_the_bottom_use_only_what_is_below_them():
    uses = arrows()
    assert uses["codebooks"] == uses["kernels"] == set()
    assert uses["formats"] == {"codebooks"}
    assert uses["backends"] == {"formats"}  # kernels are loaded when they are used
    assert uses["blockwise"] == {"backends", "formats"}


def test_each_room_uses_only_those_above_it_in_the_readmes_list():
    listing = re.search(r"```\nnf4lab/\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    order = re.findall(r"^  ([a-z_]+)", listing, re.MULTILINE)
    for room, used in arrows().items():
        assert room == "__main__" or used <= set(order[: order.index(room)]), room


@pytest.mark.parametrize(
    "room", ["codebooks", "formats", "backends", "checkpoints", "layers", "beyond", "models"]
)  # those of several modules each of which is an idea
def test_a_room_lists_its_modules(room):
    doc = ast.get_docstring(ast.parse((ROOT / "nf4lab" / room / "__init__.py").read_text()))
    listed = re.findall(r"^([a-z_]+)  +\S", doc, re.MULTILINE)
    modules = {path.stem for path in (ROOT / "nf4lab" / room).glob("*.py")} - {"__init__"}
    assert set(listed) == modules and len(listed) == len(modules)


@pytest.mark.parametrize("backend", ["torch", None])  # asked for, or chosen for so small a tensor
def test_quantizing_goes_from_file_to_file_no_more_than_it_must(backend, monkeypatch):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    nf4lab.quantize(x, backend=backend)
    assert walk(lambda: nf4lab.quantize(x, backend=backend)).counts[2] <= 6
    monkeypatch.setattr(nf4lab.FORMATS, "_made", {})  # as in a new process: the levels are derived on the way
    first = walk(lambda: nf4lab.quantize(x, backend=backend))
    assert ("codebooks/closed.py", "nf4") in first.called and first.counts[2] <= 8


@pytest.mark.parametrize(("size", "most"), [(512, 4), (64, 9)])  # by a kernel, by the reference
def test_a_forward_pass_goes_from_file_to_file_no_more_than_it_must(size, most):
    layer, x = nf4lab.Linear4bit.from_linear(torch.nn.Linear(size, size)), torch.ones(3, size)
    layer(x)  # what is made ready once
    assert walk(lambda: layer(x)).counts[2] <= most


def test_importing_the_package_loads_neither_scipy_stats_nor_numba_nor_matplotlib_nor_distributed_tensors():
    script = (
        "import sys, nf4lab; print(sorted({'scipy.stats', 'numba', 'matplotlib', 'transformers', "
        "'torch.distributed.tensor'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_what_kernels_take_from_the_intrinsics_is_there_for_a_gpu_and_for_the_simulator():
    rooms = (ROOT / "nf4lab" / "kernels" / "cuda").glob("*.py")
    imports = [
        node for path in rooms for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    taken = {alias.name for node in imports if (node.module or "").endswith("intrinsics") for alias in node.names}
    assert len(taken) > 30
    for module in (ptx, simulated):
        assert not [name for name in taken if not hasattr(module, name)]
