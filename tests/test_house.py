"""The house: pins and ranges agree, nothing that is made is stored."""

import importlib.metadata
import json
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
